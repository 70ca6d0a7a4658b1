-- One of each kind of thing that a tenant may make.
CREATE EXTENSION pgcrypto; CREATE EXTENSION citext; CREATE EXTENSION hstore; CREATE EXTENSION btree_gist;
CREATE TYPE mood AS ENUM ('sad', 'happy'); CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE TYPE pair AS (a int, b text); CREATE TYPE span AS RANGE (subtype = float8);
CREATE TABLE types (
  id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, big bigint, small smallint, exact numeric, float8 float8,
  float4 float4, text text NOT NULL DEFAULT 'x', cite citext, fixed char(5), flag boolean, bytes bytea,
  uuid uuid DEFAULT gen_random_uuid(), doc json, docb jsonb, numbers int[], words text[][],
  mood mood, positive positive, pair pair, span span, store hstore, day date, "time" time,
  moment timestamptz, local timestamp, length interval, money money, ip inet, net cidr, mac macaddr,
  bits bit(3), point point, shape polygon, search tsvector, xml xml, lsn pg_lsn, rel regclass,
  twice numeric GENERATED ALWAYS AS (exact * 2) STORED, "odd ""name" int);
INSERT INTO types (big, small, exact, float8, float4, text, cite, fixed, flag, bytes, doc, docb, numbers, words, mood,
  positive, pair, span, store, day, "time", moment, local, length, money, ip, net, mac, bits, point, shape, search, xml,
  lsn, rel, "odd ""name") VALUES
  (9223372036854775807, -1, 0.10, 0.1::float8 + 0.2, 'NaN', E'é€\U0001F600\\\n\t''', 'Case', 'ab', true, '\x00ff',
   '{"a":  1}', '{"a": [1, null]}', '{1,NULL,3}', '{{a,"b c"},{"","NULL"}}', 'happy', 5, '(1,"x,y")', '[0.5,2)', 'a=>1',
   '2024-02-29', '23:59:60', '2024-01-01 12:00+02', 'infinity', '1 mon -2 days', 12.5, '::1', '10.0.0.0/8',
   '08:00:2b:01:02:03', B'101', '(1,2)', '((0,0),(1,1),(1,0))', 'a:1 b:2', '<a>é</a>', '1/2', 'types', 7),
  (NULL, NULL, NULL, '-Infinity', -0.0, '', NULL, NULL, NULL, '', 'null', 'null', '{}', '{}', NULL, NULL, NULL, NULL,
   NULL, '4714-11-24 BC',
   NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL);
CREATE TABLE no_columns (); INSERT INTO no_columns DEFAULT VALUES;
CREATE UNLOGGED TABLE scratch (n int);
CREATE TABLE many AS SELECT n, md5(n::text) AS hash FROM generate_series(1, 20000) n;
ALTER TABLE many ADD CONSTRAINT many_pk PRIMARY KEY (n);
CREATE UNIQUE INDEX ON many (hash) INCLUDE (n) WHERE n > 5; CREATE INDEX ON many (lower(hash) DESC NULLS LAST);
CREATE INDEX ON types USING gin (docb); CREATE STATISTICS pairs ON n, hash FROM many;
ALTER TABLE types ADD EXCLUDE USING gist (big WITH =), ADD FOREIGN KEY (positive) REFERENCES many (n) DEFERRABLE;
CREATE TABLE measured (day date NOT NULL, n int) PARTITION BY RANGE (day);
CREATE TABLE measured_2023 PARTITION OF measured FOR VALUES FROM ('2023-01-01') TO ('2024-01-01');
CREATE TABLE measured_rest (n int, day date NOT NULL); ALTER TABLE measured ATTACH PARTITION measured_rest DEFAULT;
CREATE INDEX ON measured (n); INSERT INTO measured VALUES ('2023-05-05', 1), ('2025-05-05', 2), ('2025-05-06', 2);
CREATE TABLE parent (a int); CREATE TABLE child (c int) INHERITS (parent); ALTER TABLE parent ADD b int;
INSERT INTO parent VALUES (1, 2); INSERT INTO child (a, b, c) VALUES (1, 2, 3);
CREATE SCHEMA "My Schema"; CREATE SEQUENCE "My Schema".numbers START 7 INCREMENT 3;
SELECT nextval('"My Schema".numbers');
CREATE TABLE "My Schema"."Table; DROP" (n int DEFAULT nextval('"My Schema".numbers'));
INSERT INTO "My Schema"."Table; DROP" DEFAULT VALUES;
CREATE VIEW happy AS SELECT id, text FROM types WHERE mood = 'happy';
CREATE MATERIALIZED VIEW counted AS SELECT count(*) FROM many; CREATE UNIQUE INDEX ON counted (count);
CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN NEW.text := 'stamped'; RETURN NEW; END$$;
CREATE TRIGGER stamp BEFORE INSERT ON types FOR EACH ROW EXECUTE FUNCTION stamp();
CREATE PROCEDURE nothing() LANGUAGE sql BEGIN ATOMIC SELECT 1; END;
CREATE RULE quiet AS ON DELETE TO parent DO INSTEAD NOTHING;
ALTER TABLE many ENABLE ROW LEVEL SECURITY; CREATE POLICY few ON many USING (n < 10);
CREATE PUBLICATION changes FOR TABLE types; COMMENT ON TABLE types IS 'one of each'; COMMENT ON SCHEMA public IS 'ours';
CREATE TABLE public.held (n int); REVOKE ALL ON held FROM CURRENT_USER;
CREATE TABLE forced (n int); INSERT INTO forced VALUES (1);
ALTER TABLE forced ENABLE ROW LEVEL SECURITY; ALTER TABLE forced FORCE ROW LEVEL SECURITY;
SELECT lo_from_bytea(4711, 'large'), lo_create(4712), lo_put(4712, 10000, 'after a hole');
