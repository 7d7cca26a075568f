-- works_from: 1
--
-- Signals that come before their waiters (MBX). Triggers give a buffered payload to the next waiter of its name, and
-- delete the payloads of a deleted run, so both happen whichever statement changes a waiter or a run, those of an older
-- flowstore included.
--
-- Table deliveries also remembers the delivery_id of a buffered payload, with an empty step_key, which is no key of a
-- step, and the time of buffering in delivered_at. An older flowstore therefore finds the id and delivers nothing twice.
CREATE TABLE buffered_signals (
    number       INTEGER PRIMARY KEY, -- rises: SQLite assigns the successor of the highest number
    run_id       BLOB NOT NULL,
    signal_name  TEXT NOT NULL,
    payload_json TEXT NOT NULL,
    buffered_at  INTEGER NOT NULL
) STRICT;

-- The payloads of a name in the order of number, with which index entries end.
CREATE INDEX buffered_signals_waited ON buffered_signals (run_id, signal_name);

CREATE TRIGGER take_buffered AFTER INSERT ON waiters
WHEN NEW.delivered_at IS NULL AND NEW.expired_at IS NULL
    AND EXISTS (SELECT 1 FROM buffered_signals WHERE run_id = NEW.run_id AND signal_name = NEW.signal_name) BEGIN
    UPDATE waiters SET delivered_at = NEW.created_at, payload_json = (
        SELECT payload_json FROM buffered_signals WHERE run_id = NEW.run_id AND signal_name = NEW.signal_name
        ORDER BY number LIMIT 1
    ) WHERE run_id = NEW.run_id AND step_key = NEW.step_key;
    DELETE FROM buffered_signals WHERE number = (
        SELECT MIN(number) FROM buffered_signals WHERE run_id = NEW.run_id AND signal_name = NEW.signal_name
    );
END;

-- A trigger does not know the time of its statement: register_waiter sets delivered_at again.
CREATE TRIGGER take_buffered_renamed AFTER UPDATE OF signal_name ON waiters
WHEN NEW.delivered_at IS NULL AND NEW.expired_at IS NULL
    AND EXISTS (SELECT 1 FROM buffered_signals WHERE run_id = NEW.run_id AND signal_name = NEW.signal_name) BEGIN
    UPDATE waiters SET delivered_at = CAST((julianday('now') - 2440587.5) * 86400000000.0 AS INTEGER), payload_json = (
        SELECT payload_json FROM buffered_signals WHERE run_id = NEW.run_id AND signal_name = NEW.signal_name
        ORDER BY number LIMIT 1
    ) WHERE run_id = NEW.run_id AND step_key = NEW.step_key;
    DELETE FROM buffered_signals WHERE number = (
        SELECT MIN(number) FROM buffered_signals WHERE run_id = NEW.run_id AND signal_name = NEW.signal_name
    );
END;

CREATE TRIGGER drop_buffered AFTER DELETE ON runs BEGIN
    DELETE FROM buffered_signals WHERE run_id = OLD.run_id;
END;
