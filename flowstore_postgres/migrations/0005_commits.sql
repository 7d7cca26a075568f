-- works_from: 1
--
-- What became of a transaction whose COMMIT got no answer. Its id alone does not tell: a server that crashes,
-- or a standby that takes over, gives the ids that it never heard of to other transactions. So each transaction
-- leaves a token in the row of its connection, and whoever looks for the token afterwards finds it or does not.
-- A row is of no use once its connection is gone and asked after; cleanup deletes those a day old.
CREATE TABLE {schema}.commits (
    connection bigint      NOT NULL PRIMARY KEY,
    token      bigint      NOT NULL,
    noted_at   timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50);

-- Whoever may use the tables of version 1 may use this one.
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
