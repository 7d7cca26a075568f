-- works_from: 1
--
-- The call that won a step's claim last. It stays when the claim goes, so that a call whose answer was lost is
-- told that it won, even if the claim was released since or the run is over.
ALTER TABLE {schema}.steps ADD COLUMN claim_call bigint;
