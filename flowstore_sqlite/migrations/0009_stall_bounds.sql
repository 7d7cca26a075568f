-- works_from: 1
--
-- get_stalled_steps reads by index what is due, so that its cost does not depend on the number of active runs.
--
-- stall_bound of a Running run is the time before which none of its steps stalls (STP-8), or the largest integer if no
-- time makes one stall. get_stalled_steps sets it where steps sleep or have stalled for long (stalled.py), and marks
-- those steps as noted. It reads every step of the runs without a bound. The statements of a step's usual way change
-- neither; triggers remove the bound after any other change that may make a step stall earlier, whichever version of
-- flowstore makes it.
ALTER TABLE runs ADD COLUMN stall_bound INTEGER;
ALTER TABLE steps ADD COLUMN stall_noted INTEGER NOT NULL DEFAULT 0;
CREATE INDEX runs_stall_bound ON runs (stall_bound) WHERE status = 'Running';

CREATE TRIGGER unbound_added AFTER INSERT ON steps
WHEN (SELECT stall_bound FROM runs WHERE run_id = NEW.run_id) IS NOT NULL BEGIN
    UPDATE runs SET stall_bound = NULL WHERE run_id = NEW.run_id;
END;

CREATE TRIGGER unbound_changed AFTER UPDATE OF
    status, claimed_at, expires_at, dispatched_at, due_at, attempt_started_at, attempt_completed_at ON steps
WHEN OLD.stall_noted BEGIN
    UPDATE steps SET stall_noted = 0 WHERE run_id = NEW.run_id AND step_key = NEW.step_key;
    UPDATE runs SET stall_bound = NULL WHERE run_id = NEW.run_id AND stall_bound IS NOT NULL;
END;

-- A step that has ended is not noted, and starts again or is reopened.
CREATE TRIGGER unbound_restarted AFTER UPDATE OF status ON steps
WHEN OLD.status IN ('Succeeded', 'Failed', 'Skipped')
    AND (NEW.status IS NULL OR NEW.status IN ('Pending', 'Running')) BEGIN
    UPDATE runs SET stall_bound = NULL WHERE run_id = NEW.run_id AND stall_bound IS NOT NULL;
END;

CREATE TRIGGER unbound_delivered AFTER UPDATE OF expires_at, delivered_at ON waiters BEGIN
    UPDATE runs SET stall_bound = NULL WHERE run_id = NEW.run_id AND stall_bound IS NOT NULL;
END;

CREATE TRIGGER unbound_unblocked AFTER DELETE ON waiters BEGIN
    UPDATE runs SET stall_bound = NULL WHERE run_id = OLD.run_id AND stall_bound IS NOT NULL;
END;
