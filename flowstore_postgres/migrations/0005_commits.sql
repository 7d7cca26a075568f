-- works_from: 1
--
-- Resolves transactions whose COMMIT was not acknowledged. The transaction id is not enough: a server that crashed, or
-- a standby after a failover, assigns lost ids to other transactions. So each transaction stores a token in the row of
-- its connection, and a probe for the token shows whether it was committed. A row is obsolete once its connection is
-- closed and resolved; cleanup deletes rows that are a day old.
CREATE TABLE {schema}.commits (
    connection bigint      NOT NULL PRIMARY KEY,
    token      bigint      NOT NULL,
    noted_at   timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50);

-- Roles with privileges on the tables of version 1 get the same on this one.
DO $grant$
DECLARE
    one record;
BEGIN
    FOR one IN
        SELECT DISTINCT acl.grantee, acl.privilege_type
        FROM pg_catalog.pg_class c, aclexplode(c.relacl) acl
        WHERE c.oid = $name${schema}.runs$name$::regclass AND acl.grantee <> c.relowner
          AND acl.privilege_type IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
    LOOP
        EXECUTE 'GRANT ' || one.privilege_type || ' ON ' || $name${schema}.commits$name$ || ' TO '
            || CASE one.grantee WHEN 0 THEN 'PUBLIC' ELSE one.grantee::regrole::text END;
    END LOOP;
END
$grant$;
