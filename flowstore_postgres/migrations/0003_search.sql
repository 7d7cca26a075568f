-- works_from: 1
--
-- An index for searches (QRY-2), if the extension pg_trgm is installed. It costs writers little: a run that ends adds
-- its id to unsearched, and the texts of these runs are indexed later, in batches, by cleanup, by searches and by
-- "flowstore migrate up". A search collects the runs whose indexed text has its trigrams, every run in unsearched and
-- every Running run, and then checks the runs themselves, so its result is the same as without the index.

-- To load many completed runs, load steps and attempts first, or everything in one transaction, so that no text is
-- indexed without them. Then run "flowstore migrate up", which is the fastest way to index many runs.

-- The text of a run when it was indexed, with ASCII letters folded. It may contain more than the run does now. It
-- contains less only while the run is Running or in unsearched.
CREATE TABLE {schema}.run_texts (
    run_id uuid NOT NULL PRIMARY KEY,
    text   text NOT NULL
);
CREATE TABLE {schema}.unsearched (
    run_id uuid NOT NULL PRIMARY KEY
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

-- True if the run was indexed after it ended but while this step was open.
ALTER TABLE {schema}.steps ADD COLUMN searched_open boolean NOT NULL DEFAULT false;

CREATE FUNCTION {schema}.note_ended_run() RETURNS trigger LANGUAGE plpgsql AS $note$
BEGIN
    INSERT INTO {schema}.unsearched VALUES (NEW.run_id) ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$note$;

CREATE FUNCTION {schema}.note_late_step() RETURNS trigger LANGUAGE plpgsql AS $note$
BEGIN
    INSERT INTO {schema}.unsearched
    SELECT run_id FROM {schema}.runs WHERE run_id = NEW.run_id AND status <> 'Running'
    -- Locks the row that is there already, so that nobody gathers the run without what is written here.
    ON CONFLICT (run_id) DO UPDATE SET run_id = excluded.run_id;
    RETURN NULL;
END
$note$;

CREATE FUNCTION {schema}.forget_text() RETURNS trigger LANGUAGE plpgsql AS $forget$
BEGIN
    DELETE FROM {schema}.run_texts WHERE run_id = OLD.run_id;
    DELETE FROM {schema}.unsearched WHERE run_id = OLD.run_id;
    RETURN NULL;
END
$forget$;

-- Indexes the texts of some runs of unsearched and returns their number. The rows are locked, so their steps do not
-- change meanwhile; each statement of a function at READ COMMITTED has a new snapshot.
CREATE FUNCTION {schema}.gather_texts(most integer) RETURNS integer LANGUAGE plpgsql AS $gather$
DECLARE
    chosen uuid[];
BEGIN
    SELECT array_agg(run_id) INTO chosen FROM (
        SELECT run_id FROM {schema}.unsearched JOIN {schema}.runs USING (run_id)
        ORDER BY run_id LIMIT most FOR UPDATE SKIP LOCKED
    ) locked;
    IF chosen IS NULL THEN
        RETURN 0;
    END IF;
    DELETE FROM {schema}.unsearched WHERE run_id = ANY(chosen);
    UPDATE {schema}.steps SET searched_open = true
    WHERE run_id = ANY(chosen) AND status IN ('Pending', 'Running') AND NOT searched_open;
    INSERT INTO {schema}.run_texts AS t (run_id, text)
    SELECT r.run_id, lower(concat_ws(
        E'\n', r.run_id::text, r.flow_name, r.trigger_key, r.status, r.job_id,
        (SELECT string_agg(concat_ws(E'\n', s.step_key, left(s.error_message, 65536),
                                     left(s.output_json, 65536)), E'\n')
         FROM {schema}.steps s WHERE s.run_id = r.run_id AND s.status IS NOT NULL),
        (SELECT string_agg(concat_ws(E'\n', left(a.error_message, 65536), left(a.output_json, 65536)), E'\n')
         FROM {schema}.attempts a WHERE a.run_id = r.run_id)
    ) COLLATE "C")
    FROM {schema}.runs r WHERE r.run_id = ANY(chosen)
    ON CONFLICT (run_id) DO UPDATE SET text = excluded.text;
    RETURN cardinality(chosen);
END
$gather$;

-- Builds the index of the texts if it is missing.
CREATE FUNCTION {schema}.index_texts() RETURNS void LANGUAGE plpgsql AS $index$
DECLARE
    place text;
BEGIN
    SELECT quote_ident(n.nspname) INTO place
    FROM pg_catalog.pg_extension e JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace
    WHERE e.extname = 'pg_trgm';
    EXECUTE 'CREATE INDEX IF NOT EXISTS run_texts_by_trigram ON ' || $name${schema}.run_texts$name$
            || ' USING gin (text ' || place || '.gin_trgm_ops)';
END
$index$;

-- Builds the index if pg_trgm is installed, and creates the triggers that record unindexed runs. Idempotent. Returns
-- whether the index exists. It never installs the extension, because that belongs to the database, not to the schema.
CREATE FUNCTION {schema}.enable_search() RETURNS boolean LANGUAGE plpgsql AS $enable$
BEGIN
    IF EXISTS (SELECT FROM pg_catalog.pg_trigger
               WHERE tgname = 'search_ended' AND tgrelid = $name${schema}.runs$name$::regclass) THEN
        RETURN true;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = 'pg_trgm') THEN
        RETURN false;
    END IF;
    LOCK TABLE {schema}.runs IN ACCESS EXCLUSIVE MODE;
    LOCK TABLE {schema}.steps IN SHARE ROW EXCLUSIVE MODE;
    PERFORM {schema}.index_texts();
    CREATE TRIGGER search_ended AFTER UPDATE OF status ON {schema}.runs FOR EACH ROW
        WHEN (NEW.status <> 'Running') EXECUTE FUNCTION {schema}.note_ended_run();
    CREATE TRIGGER search_loaded AFTER INSERT ON {schema}.runs FOR EACH ROW
        WHEN (NEW.status <> 'Running') EXECUTE FUNCTION {schema}.note_ended_run();
    CREATE TRIGGER search_deleted AFTER DELETE ON {schema}.runs FOR EACH ROW
        EXECUTE FUNCTION {schema}.forget_text();
    CREATE TRIGGER search_late AFTER UPDATE OF status ON {schema}.steps FOR EACH ROW
        WHEN (OLD.searched_open OR (OLD.status IS NULL AND NEW.status = 'Skipped'))
        EXECUTE FUNCTION {schema}.note_late_step();
    CREATE TRIGGER search_skipped AFTER INSERT ON {schema}.steps FOR EACH ROW
        WHEN (NEW.status = 'Skipped') EXECUTE FUNCTION {schema}.note_late_step();
    INSERT INTO {schema}.unsearched SELECT run_id FROM {schema}.runs WHERE status <> 'Running'
    ON CONFLICT DO NOTHING;
    RETURN true;
END
$enable$;

-- Roles with privileges on the tables of version 1 get the same on those of versions 2 and 3.
DO $grant$
DECLARE
    one record;
    made text;
BEGIN
    FOR one IN
        SELECT DISTINCT acl.grantee, acl.privilege_type, acl.is_grantable
        FROM pg_catalog.pg_class c, aclexplode(c.relacl) acl
        WHERE c.oid = $name${schema}.runs$name$::regclass AND acl.grantee <> c.relowner
          AND acl.privilege_type IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
    LOOP
        FOREACH made IN ARRAY ARRAY[
            $name${schema}.run_changes$name$, $name${schema}.run_counts$name$, $name${schema}.run_days$name$,
            $name${schema}.run_summaries$name$, $name${schema}.run_texts$name$, $name${schema}.unsearched$name$
        ] LOOP
            EXECUTE 'GRANT ' || one.privilege_type || ' ON ' || made || ' TO '
                || CASE one.grantee WHEN 0 THEN 'PUBLIC' ELSE one.grantee::regrole::text END;
        END LOOP;
    END LOOP;
END
$grant$;

SELECT {schema}.enable_search();
