-- works_from: 1
--
-- get_runs_to_stop reads deadlines and latches by index, so that its cost does not depend on the number of runs.
--
-- The control record of a run stays after the end of the run. ended removes it from the indexes. It is 1 only if the
-- run has ended; it may be 0 after the end, so get_runs_to_stop checks the status too.
ALTER TABLE controls ADD COLUMN ended INTEGER NOT NULL DEFAULT 0;
UPDATE controls SET ended = 1
WHERE (timeout_at IS NOT NULL OR cancelled_at IS NOT NULL OR timed_out_at IS NOT NULL)
    AND EXISTS (SELECT 1 FROM runs WHERE runs.run_id = controls.run_id AND status <> 'Running');

CREATE INDEX controls_deadline ON controls (timeout_at) WHERE timeout_at IS NOT NULL AND ended = 0;
CREATE INDEX controls_latched ON controls (timeout_at IS NULL, timeout_at)
WHERE ended = 0 AND (cancelled_at IS NOT NULL OR timed_out_at IS NOT NULL);

-- A record without deadline and latch is in no index, so the end of its run does not change it.
CREATE TRIGGER note_end AFTER UPDATE OF status ON runs BEGIN
    UPDATE controls SET ended = NEW.status <> 'Running'
    WHERE run_id = NEW.run_id AND CASE NEW.status
        WHEN 'Running' THEN ended
        ELSE timeout_at IS NOT NULL OR cancelled_at IS NOT NULL OR timed_out_at IS NOT NULL
    END;
END;

CREATE TRIGGER note_late_change AFTER UPDATE OF timeout_at, cancelled_at, timed_out_at ON controls
WHEN NOT NEW.ended AND EXISTS (SELECT 1 FROM runs WHERE run_id = NEW.run_id AND status <> 'Running') BEGIN
    UPDATE controls SET ended = 1 WHERE run_id = NEW.run_id;
END;
