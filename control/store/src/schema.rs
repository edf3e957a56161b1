//! The tables, as numbered migrations that only go forward. Released ones are never edited.
//!
//! SQL that PostgreSQL understands unchanged: ids are text, numbers BIGINT, bodies JSON text.

use sqlx::{Connection as _, SqliteConnection};

/// The schema that this program writes. It reads and upgrades every older one.
pub const SCHEMA_VERSION: i64 = MIGRATIONS.len() as i64;

/// Form of the JSON bodies that this program writes. A body of a newer form is refused, not guessed at.
pub(crate) const BODY_VERSION: i64 = 1;

/// The n-th leads from schema n to schema n + 1.
const MIGRATIONS: [&str; 4] = [V1, V2, V3, V4];

/// Why the schema could not be brought up to date.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SchemaError {
    #[error("the store is of schema {found}, newer than this program's {SCHEMA_VERSION}")]
    Newer { found: i64 },
    #[error("the store's schema could not be read or upgraded")]
    Sql(#[from] sqlx::Error),
}

/// Brings an older or empty database to [`SCHEMA_VERSION`], each step in its own transaction.
pub(crate) async fn upgrade(connection: &mut SqliteConnection) -> Result<(), SchemaError> {
    let create = "CREATE TABLE IF NOT EXISTS schema_version (version BIGINT PRIMARY KEY)";
    sqlx::query(create).execute(&mut *connection).await?;
    let found: Option<i64> = sqlx::query_scalar("SELECT MAX(version) FROM schema_version")
        .fetch_one(&mut *connection)
        .await?;
    let found = found.unwrap_or(0);
    if found > SCHEMA_VERSION {
        return Err(SchemaError::Newer { found });
    }
    for (migration, version) in MIGRATIONS
        .into_iter()
        .zip(1i64..)
        .skip(usize::try_from(found).unwrap_or(0))
    {
        let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await?;
        sqlx::raw_sql(migration).execute(&mut *transaction).await?;
        sqlx::query("INSERT INTO schema_version (version) VALUES ($1)")
            .bind(version)
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
    }
    Ok(())
}

const V1: &str = "
CREATE TABLE leader (
    id BIGINT PRIMARY KEY CHECK (id = 1),
    epoch BIGINT NOT NULL,
    commits BIGINT NOT NULL
);
INSERT INTO leader (id, epoch, commits) VALUES (1, 0, 0);

CREATE TABLE project (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL
);
CREATE TABLE host (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL
);
CREATE TABLE pool (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL
);
CREATE TABLE network (
    id TEXT PRIMARY KEY,
    project_id TEXT NOT NULL REFERENCES project (id) DEFERRABLE INITIALLY DEFERRED,
    name TEXT NOT NULL,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (project_id, name)
);
CREATE TABLE subnet (
    id TEXT PRIMARY KEY,
    network_id TEXT NOT NULL REFERENCES network (id) DEFERRABLE INITIALLY DEFERRED,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX subnet_network ON subnet (network_id);
CREATE TABLE template (
    id TEXT PRIMARY KEY,
    project_id TEXT NOT NULL REFERENCES project (id) DEFERRABLE INITIALLY DEFERRED,
    name TEXT NOT NULL,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (project_id, name)
);
CREATE TABLE vm (
    id TEXT PRIMARY KEY,
    project_id TEXT NOT NULL REFERENCES project (id) DEFERRABLE INITIALLY DEFERRED,
    name TEXT NOT NULL,
    host_id TEXT,
    state TEXT NOT NULL,
    generation BIGINT NOT NULL,
    highest BIGINT NOT NULL,
    revision BIGINT NOT NULL,
    ordered BIGINT NOT NULL,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (project_id, name),
    CHECK (generation <= highest)
);
CREATE TABLE volume (
    id TEXT PRIMARY KEY,
    project_id TEXT NOT NULL REFERENCES project (id) DEFERRABLE INITIALLY DEFERRED,
    pool_id TEXT NOT NULL REFERENCES pool (id) DEFERRABLE INITIALLY DEFERRED,
    owner_id TEXT REFERENCES vm (id) DEFERRABLE INITIALLY DEFERRED,
    generation BIGINT NOT NULL,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX volume_pool ON volume (pool_id);
CREATE INDEX volume_owner ON volume (owner_id);
CREATE TABLE port (
    id TEXT PRIMARY KEY,
    project_id TEXT NOT NULL REFERENCES project (id) DEFERRABLE INITIALLY DEFERRED,
    network_id TEXT NOT NULL REFERENCES network (id) DEFERRABLE INITIALLY DEFERRED,
    subnet_id TEXT NOT NULL REFERENCES subnet (id) DEFERRABLE INITIALLY DEFERRED,
    vm_id TEXT REFERENCES vm (id) DEFERRABLE INITIALLY DEFERRED,
    bound_host_id TEXT,
    generation BIGINT NOT NULL,
    mac TEXT NOT NULL UNIQUE,
    ip TEXT NOT NULL,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (subnet_id, ip)
);
CREATE INDEX port_network ON port (network_id);
CREATE INDEX port_vm ON port (vm_id);
CREATE TABLE operation (
    id TEXT PRIMARY KEY,
    project_id TEXT NOT NULL,
    target_id TEXT NOT NULL,
    state TEXT NOT NULL,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX operation_project ON operation (project_id, id);
CREATE INDEX operation_state ON operation (state, id);
CREATE TABLE join_token (
    id TEXT PRIMARY KEY,
    expires_at BIGINT NOT NULL,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL
);
CREATE TABLE api_token (
    id TEXT PRIMARY KEY,
    hash TEXT NOT NULL UNIQUE,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL
);
CREATE TABLE outbox (
    host_id TEXT NOT NULL,
    subject TEXT NOT NULL,
    revision BIGINT NOT NULL,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (host_id, subject)
);
CREATE TABLE answer (
    project_id TEXT NOT NULL,
    request_key TEXT NOT NULL,
    body_hash TEXT NOT NULL,
    operation_id TEXT NOT NULL,
    answered_at BIGINT NOT NULL,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (project_id, request_key)
);
CREATE INDEX answer_age ON answer (answered_at);
CREATE TABLE notice (
    sequence BIGINT PRIMARY KEY,
    project_id TEXT,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL
);
";

/// Users and the audit log. `user` alone is a word of SQL.
const V2: &str = "
CREATE TABLE cell_user (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL
);
CREATE TABLE audit_entry (
    id TEXT PRIMARY KEY,
    project_id TEXT,
    subject TEXT NOT NULL,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX audit_entry_project ON audit_entry (project_id, id);
CREATE INDEX audit_entry_subject ON audit_entry (subject, id);
";

/// What guests are told at their first start. It may hold secrets: no other table has it, and it goes with its VM.
const V3: &str = "
CREATE TABLE vm_seed (
    vm_id TEXT PRIMARY KEY REFERENCES vm (id) DEFERRABLE INITIALLY DEFERRED,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL
);
";

/// Security groups.
const V4: &str = "
CREATE TABLE security_group (
    id TEXT PRIMARY KEY,
    project_id TEXT NOT NULL REFERENCES project (id) DEFERRABLE INITIALLY DEFERRED,
    name TEXT NOT NULL,
    body_version BIGINT NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (project_id, name)
);
";
