-- works_from: 1
--
-- A flow whose last run was deleted leaves no row in run_counts. Until a run of it is deleted, its rows with
-- amount 0 stay: the next run then updates a row instead of inserting one.

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
