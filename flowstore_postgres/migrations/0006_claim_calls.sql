-- works_from: 1
--
-- The token of the last call that won the step's claim. It stays when the claim is released, so that a call with a
-- lost reply is resolved as won even if the claim was released since or the run has ended.
ALTER TABLE {schema}.steps ADD COLUMN claim_call bigint;
