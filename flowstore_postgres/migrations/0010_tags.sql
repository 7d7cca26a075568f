-- works_from: 1
--
-- Tags (TAG). The column has all tags of a run as an object of strings, so that reading a run reads one row; it is NULL
-- without tags. run_tags is the index for finding runs. Triggers fill it, for every way to write or delete a run, those
-- of an older flowstore included; they do nothing for a run without tags.
ALTER TABLE {schema}.runs ADD COLUMN tags jsonb;

-- The primary key has the runs with a tag and a status in the order of QRY-1, read backward. flow_id and status are
-- those of the run, so that pages and counts by flow and status read no runs.
CREATE TABLE {schema}.run_tags (
    tag_key    text        COLLATE "C" NOT NULL,
    tag_value  text        COLLATE "C" NOT NULL,
    status     text        NOT NULL,
    started_at timestamptz NOT NULL,
    run_id     uuid        NOT NULL,
    flow_id    uuid        NOT NULL,
    PRIMARY KEY (tag_key, tag_value, status, started_at, run_id) INCLUDE (flow_id)
);

-- The settings let every plan find its rows by key, also one that was made while the table was small. OLD is NULL after
-- an INSERT, and NEW after a DELETE.
CREATE FUNCTION {schema}.index_tags() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_hashjoin = off
SET enable_mergejoin = off AS $index$
BEGIN
    PERFORM set_config('search_path', 'pg_catalog, ' || quote_ident(TG_TABLE_SCHEMA) || ', pg_temp', true);
    DELETE FROM run_tags t USING jsonb_each_text(OLD.tags) o
    WHERE t.tag_key = o.key AND t.tag_value = o.value AND t.status = OLD.status AND t.started_at = OLD.started_at
      AND t.run_id = OLD.run_id AND (NEW.status, NEW.tags ->> o.key) IS DISTINCT FROM (OLD.status, o.value);
    INSERT INTO run_tags (tag_key, tag_value, status, started_at, run_id, flow_id)
    SELECT key, value, NEW.status, NEW.started_at, NEW.run_id, NEW.flow_id FROM jsonb_each_text(NEW.tags)
    ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$index$;

CREATE FUNCTION {schema}.forget_tags() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $forget$
BEGIN
    PERFORM set_config('search_path', 'pg_catalog, ' || quote_ident(TG_TABLE_SCHEMA) || ', pg_temp', true);
    DELETE FROM run_tags;
    RETURN NULL;
END
$forget$;

CREATE FUNCTION {schema}.ignore_loaded_tag() RETURNS trigger LANGUAGE plpgsql AS $ignore$
BEGIN
    RETURN NULL;
END
$ignore$;

CREATE TRIGGER tags_inserted AFTER INSERT ON {schema}.runs FOR EACH ROW
    WHEN (NEW.tags IS NOT NULL) EXECUTE FUNCTION {schema}.index_tags();
CREATE TRIGGER tags_changed AFTER UPDATE OF tags, status ON {schema}.runs FOR EACH ROW
    WHEN (OLD.tags IS NOT NULL OR NEW.tags IS NOT NULL) EXECUTE FUNCTION {schema}.index_tags();
CREATE TRIGGER tags_deleted AFTER DELETE ON {schema}.runs FOR EACH ROW
    WHEN (OLD.tags IS NOT NULL) EXECUTE FUNCTION {schema}.index_tags();
CREATE TRIGGER tags_truncated AFTER TRUNCATE ON {schema}.runs
    FOR EACH STATEMENT EXECUTE FUNCTION {schema}.forget_tags();
-- A dump restored with --data-only loads the runs, which fills this table, and this table.
CREATE TRIGGER ignore_loaded BEFORE INSERT ON {schema}.run_tags FOR EACH ROW
    WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION {schema}.ignore_loaded_tag();

-- Roles with privileges on table runs get the same on this one.
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
        EXECUTE 'GRANT ' || one.privilege_type || ' ON ' || $name${schema}.run_tags$name$ || ' TO '
            || CASE one.grantee WHEN 0 THEN 'PUBLIC' ELSE one.grantee::regrole::text END;
    END LOOP;
END
$grant$;
