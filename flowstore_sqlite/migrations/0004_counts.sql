-- works_from: 1
--
-- Removes the rows of a flow from run_counts when its last run is deleted. Rows with amount 0 stay until a run
-- of the flow is deleted, so that the next run updates a row instead of inserting one.

DROP TRIGGER count_deleted;

CREATE TRIGGER count_deleted AFTER DELETE ON runs BEGIN
    UPDATE run_counts SET amount = amount - 1 WHERE flow_id = OLD.flow_id AND status = OLD.status;
    DELETE FROM run_counts WHERE flow_id = OLD.flow_id AND amount = 0;
    UPDATE run_days SET changes = changes + 1
    WHERE day = (OLD.started_at - ((OLD.started_at % 86400000000) + 86400000000) % 86400000000) / 86400000000;
    UPDATE run_days SET succeeded = succeeded - (OLD.status = 'Succeeded'),
        failed = failed - (OLD.status = 'Failed')
    WHERE day
        = (OLD.completed_at - ((OLD.completed_at % 86400000000) + 86400000000) % 86400000000) / 86400000000;
END;

DELETE FROM run_counts WHERE amount = 0;
