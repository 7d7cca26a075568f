-- works_from: 1
--
-- Queues (QUE). A row of queued_steps is the queue of a dispatch, with the time from which the step is ready.
-- Triggers keep that time, so it stays correct whichever statement changes a step, a waiter or a run, those of
-- an older flowstore included. They do nothing for a step without a row here.

-- The trigger of the search index for changes after the end of a run fires less often than search_late did,
-- which pays for requeue_step in stores without queues. Both use attempt_completed_at instead of status: every
-- statement that ends a step or opens an ended one sets it, and the start of a first attempt does not.
DROP TRIGGER IF EXISTS search_late;
CREATE TRIGGER search_closed AFTER UPDATE OF attempt_completed_at ON steps
WHEN OLD.searched_open OR (OLD.status IS NULL AND NEW.status = 'Skipped') BEGIN
    INSERT INTO unsearched SELECT run_id FROM runs WHERE run_id = NEW.run_id AND status <> 'Running'
    ON CONFLICT DO NOTHING;
END;

CREATE TABLE queued_steps (
    run_id     BLOB NOT NULL,
    step_key   TEXT NOT NULL,
    queue      TEXT NOT NULL,
    priority   INTEGER NOT NULL,
    ready_at   INTEGER,             -- see step_readiness
    step_type  TEXT NOT NULL,       -- of the attempts to come
    input_json TEXT,                -- of the attempts to come
    PRIMARY KEY (run_id, step_key)
) STRICT, WITHOUT ROWID;

-- The steps of a queue in the order in which claim_next_steps hands them out (QUE-2): index entries end with
-- the primary key run_id, step_key. Ended steps have no entry.
CREATE INDEX queued_steps_ready ON queued_steps (queue, priority DESC, ready_at) WHERE ready_at IS NOT NULL;

-- The definition of ready_at (QUE-1): the latest of the due time, the end of the claim and the end of the
-- waiter. It is NULL if the step or its run has ended, and the largest integer while no time makes the step
-- ready: under a claim without lease, or with a waiter without expires_at.
CREATE VIEW step_readiness AS
SELECT run_id, step_key,
    CASE WHEN runs.status = 'Running' AND (steps.status IS NULL OR steps.status IN ('Pending', 'Running'))
        THEN MAX(
            COALESCE(due_at, dispatched_at),
            CASE WHEN claimed_at IS NULL THEN -9223372036854775808
                ELSE COALESCE(steps.expires_at, 9223372036854775807) END,
            CASE WHEN signal_name IS NULL OR delivered_at IS NOT NULL THEN -9223372036854775808
                ELSE COALESCE(waiters.expires_at, 9223372036854775807) END
        )
    END AS ready_at
FROM steps JOIN runs USING (run_id) LEFT JOIN waiters USING (run_id, step_key);

-- A procedure: "INSERT INTO step_readiness" recomputes ready_at of a step. The other triggers stay small
-- because of it, and SQLite starts a small trigger faster.
CREATE TRIGGER recompute_ready_at INSTEAD OF INSERT ON step_readiness BEGIN
    UPDATE queued_steps SET ready_at = (
        SELECT ready_at FROM step_readiness AS now WHERE now.run_id = NEW.run_id AND now.step_key = NEW.step_key
    ) WHERE run_id = NEW.run_id AND step_key = NEW.step_key;
END;

CREATE TRIGGER requeue_step
AFTER UPDATE OF attempt_completed_at, claimed_at, expires_at, dispatched_at, due_at ON steps
WHEN EXISTS (SELECT 1 FROM queued_steps WHERE run_id = NEW.run_id AND step_key = NEW.step_key) BEGIN
    INSERT INTO step_readiness (run_id, step_key) VALUES (NEW.run_id, NEW.step_key);
END;

CREATE TRIGGER dequeue_step AFTER UPDATE OF dispatched_at ON steps WHEN NEW.dispatched_at IS NULL BEGIN
    DELETE FROM queued_steps WHERE run_id = NEW.run_id AND step_key = NEW.step_key;
END;

CREATE TRIGGER requeue_waiting AFTER INSERT ON waiters
WHEN EXISTS (SELECT 1 FROM queued_steps WHERE run_id = NEW.run_id AND step_key = NEW.step_key) BEGIN
    INSERT INTO step_readiness (run_id, step_key) VALUES (NEW.run_id, NEW.step_key);
END;

CREATE TRIGGER requeue_delivered AFTER UPDATE OF expires_at, delivered_at ON waiters
WHEN EXISTS (SELECT 1 FROM queued_steps WHERE run_id = NEW.run_id AND step_key = NEW.step_key) BEGIN
    INSERT INTO step_readiness (run_id, step_key) VALUES (NEW.run_id, NEW.step_key);
END;

CREATE TRIGGER requeue_unblocked AFTER DELETE ON waiters
WHEN EXISTS (SELECT 1 FROM queued_steps WHERE run_id = OLD.run_id AND step_key = OLD.step_key) BEGIN
    INSERT INTO step_readiness (run_id, step_key) VALUES (OLD.run_id, OLD.step_key);
END;

-- The steps that have not ended when their run ends, or that a reopened run brings back.
CREATE TRIGGER requeue_run AFTER UPDATE OF status ON runs
WHEN EXISTS (SELECT 1 FROM queued_steps WHERE run_id = NEW.run_id) BEGIN
    UPDATE queued_steps SET ready_at = (
        SELECT ready_at FROM step_readiness AS now
        WHERE now.run_id = queued_steps.run_id AND now.step_key = queued_steps.step_key
    ) WHERE run_id = NEW.run_id AND (ready_at IS NOT NULL OR NEW.status = 'Running');
END;

CREATE TRIGGER dequeue_run AFTER DELETE ON runs BEGIN
    DELETE FROM queued_steps WHERE run_id = OLD.run_id;
END;
