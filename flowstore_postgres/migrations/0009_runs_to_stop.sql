-- works_from: 1
--
-- get_runs_to_stop reads deadlines and latches by index, so that its cost does not depend on the number of runs.
--
-- The control record of a run stays after the end of the run. get_runs_to_stop sets ended where it finds one, which
-- removes it from the indexes. A trigger on runs would cost every run, and few have a deadline or a latch. Any other
-- change of the record resets ended. Reopening a run is such a change, because it clears the latches.
ALTER TABLE {schema}.controls ADD COLUMN ended boolean NOT NULL DEFAULT false;
CREATE INDEX controls_by_deadline ON {schema}.controls (timeout_at, run_id)
    WHERE timeout_at IS NOT NULL AND NOT ended;
CREATE INDEX controls_latched ON {schema}.controls (timeout_at, run_id)
    WHERE (cancel_requested_at IS NOT NULL OR timed_out_at IS NOT NULL) AND NOT ended;
CREATE FUNCTION {schema}.reset_ended() RETURNS trigger LANGUAGE plpgsql AS $reset$
BEGIN
    NEW.ended := false;
    RETURN NEW;
END
$reset$;
CREATE TRIGGER reset_ended BEFORE UPDATE ON {schema}.controls FOR EACH ROW
    WHEN (OLD.ended AND NEW.ended) EXECUTE FUNCTION {schema}.reset_ended();
