//! Where each kind of row lives: its table, its key, the columns that state promises, and the statements made of them.

use std::sync::LazyLock;

use model::{
    AuditEntry, Change, Key, Notice, Operation, Order, Row, SecurityGroup, User,
    change::{Answer, OutboxRow},
    order::Subject,
    seed::SeedRow,
};
use serde::{Serialize, de::DeserializeOwned};

use crate::schema::BODY_VERSION;

/// How many rows one statement may carry, the largest first: each statement costs a visit to the database's thread.
pub(crate) const CHUNKS: [usize; 4] = [64, 16, 4, 1];

/// A value of a column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Text(String),
    Number(i64),
    Null,
}

/// A kind of row. In this order rows are loaded, so that what is referred to comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Table {
    Project,
    Host,
    Pool,
    Network,
    Subnet,
    Template,
    Vm,
    Volume,
    Port,
    Operation,
    JoinToken,
    ApiToken,
    Outbox,
    Answer,
    Notice,
    User,
    Audit,
    Seed,
    SecurityGroup,
}

struct Definition {
    name: &'static str,
    key: &'static [&'static str],
    columns: &'static [&'static str],
    /// Under which condition a row that is there may be replaced.
    replace: Replace,
}

enum Replace {
    Always,
    /// Compare and set: what was promised may not be taken back, whatever the writer believes.
    When(&'static str),
    Never,
}

/// A row as it is written: key and columns in the order of its table's definition, then its body.
pub(crate) struct Record {
    pub(crate) table: Table,
    pub(crate) values: Vec<Value>,
}

/// Why a row has no stored form.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// A number is beyond 2^63.
    #[error("a number is too large to be stored")]
    Number,
    /// The row has no JSON form.
    #[error("the row has no JSON form")]
    Json(#[from] serde_json::Error),
}

impl Table {
    pub(crate) const ALL: [Self; 19] = [
        Self::Project,
        Self::Host,
        Self::Pool,
        Self::Network,
        Self::Subnet,
        Self::Template,
        Self::Vm,
        Self::Volume,
        Self::Port,
        Self::Operation,
        Self::JoinToken,
        Self::ApiToken,
        Self::Outbox,
        Self::Answer,
        Self::Notice,
        Self::User,
        Self::Audit,
        Self::Seed,
        Self::SecurityGroup,
    ];

    // tidy: long because it is the list of all tables.
    const fn definition(self) -> Definition {
        use Replace::{Always, Never, When};
        let id: &[&str] = &["id"];
        let (name, key, columns, replace): (_, _, &[&str], _) = match self {
            Self::Project => ("project", id, &["name"], Always),
            Self::Host => ("host", id, &["name"], Always),
            Self::Pool => ("pool", id, &["name"], Always),
            Self::Network => ("network", id, &["project_id", "name"], Always),
            Self::Subnet => ("subnet", id, &["network_id"], Always),
            Self::Template => ("template", id, &["project_id", "name"], Always),
            Self::Vm => (
                "vm",
                id,
                &[
                    "project_id",
                    "name",
                    "host_id",
                    "state",
                    "generation",
                    "highest",
                    "revision",
                    "ordered",
                ],
                When(
                    "excluded.project_id = vm.project_id AND excluded.highest >= vm.highest \
                     AND excluded.revision >= vm.revision AND excluded.ordered >= vm.ordered",
                ),
            ),
            Self::Volume => (
                "volume",
                id,
                &["project_id", "pool_id", "owner_id", "generation"],
                Always,
            ),
            Self::Port => (
                "port",
                id,
                &[
                    "project_id",
                    "network_id",
                    "subnet_id",
                    "vm_id",
                    "bound_host_id",
                    "generation",
                    "mac",
                    "ip",
                ],
                Always,
            ),
            // What is over stays as it ended: no crash and no stale writer undoes it.
            Self::Operation => (
                "operation",
                id,
                &["project_id", "target_id", "state"],
                When("operation.state = 'running' OR operation.state = excluded.state"),
            ),
            Self::JoinToken => ("join_token", id, &["expires_at"], Always),
            Self::ApiToken => ("api_token", id, &["hash"], Always),
            Self::Outbox => (
                "outbox",
                &["host_id", "subject"],
                &["revision"],
                When("excluded.revision >= outbox.revision"),
            ),
            Self::Answer => (
                "answer",
                &["project_id", "request_key"],
                &["body_hash", "operation_id", "answered_at"],
                // A day later the key is as good as new, whether or not its answer has been pruned.
                When(
                    "excluded.body_hash = answer.body_hash AND excluded.operation_id = answer.operation_id \
                     OR excluded.answered_at - answer.answered_at >= 86400000",
                ),
            ),
            Self::Notice => ("notice", &["sequence"], &["project_id"], Never),
            Self::User => ("cell_user", id, &["name"], Always),
            // What was written stays as it was written.
            Self::Audit => ("audit_entry", id, &["project_id", "subject"], Never),
            Self::Seed => ("vm_seed", &["vm_id"], &[], Always),
            Self::SecurityGroup => ("security_group", id, &["project_id", "name"], Always),
        };
        Definition {
            name,
            key,
            columns,
            replace,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        self.definition().name
    }

    /// Inserts or replaces [`CHUNKS`]`[chunk]` rows; leaves those that may not be replaced as they are.
    pub(crate) fn upsert(self, chunk: usize) -> &'static str {
        static SQL: LazyLock<Vec<[String; CHUNKS.len()]>> = LazyLock::new(|| {
            Table::ALL
                .map(|table| CHUNKS.map(|rows| upsert_sql(table, rows)))
                .to_vec()
        });
        &SQL[self as usize][chunk]
    }

    /// Deletes [`CHUNKS`]`[chunk]` rows by their keys.
    pub(crate) fn delete(self, chunk: usize) -> &'static str {
        static SQL: LazyLock<Vec<[String; CHUNKS.len()]>> = LazyLock::new(|| {
            Table::ALL
                .map(|table| CHUNKS.map(|rows| delete_sql(table, rows)))
                .to_vec()
        });
        &SQL[self as usize][chunk]
    }

    /// Reads the rows that belong to the loaded world; `None` for those that do not.
    pub(crate) const fn load(self) -> Option<&'static str> {
        match self {
            Self::Project => Some("SELECT body_version, body FROM project ORDER BY id"),
            Self::Host => Some("SELECT body_version, body FROM host ORDER BY id"),
            Self::Pool => Some("SELECT body_version, body FROM pool ORDER BY id"),
            Self::Network => Some("SELECT body_version, body FROM network ORDER BY id"),
            Self::Subnet => Some("SELECT body_version, body FROM subnet ORDER BY id"),
            Self::Template => Some("SELECT body_version, body FROM template ORDER BY id"),
            Self::Vm => Some("SELECT body_version, body FROM vm ORDER BY id"),
            Self::Volume => Some("SELECT body_version, body FROM volume ORDER BY id"),
            Self::Port => Some("SELECT body_version, body FROM port ORDER BY id"),
            Self::Operation => Some("SELECT body_version, body FROM operation WHERE state = 'running' ORDER BY id"),
            Self::JoinToken => Some("SELECT body_version, body FROM join_token ORDER BY id"),
            Self::ApiToken => Some("SELECT body_version, body FROM api_token ORDER BY id"),
            Self::Outbox => Some("SELECT body_version, body FROM outbox ORDER BY host_id, subject"),
            Self::User => Some("SELECT body_version, body FROM cell_user ORDER BY id"),
            Self::Seed => Some("SELECT body_version, body FROM vm_seed ORDER BY vm_id"),
            Self::SecurityGroup => Some("SELECT body_version, body FROM security_group ORDER BY id"),
            Self::Answer | Self::Notice | Self::Audit => None,
        }
    }

    /// Reads a body back.
    pub(crate) fn decode(self, body: &str) -> Result<Row, serde_json::Error> {
        fn read<T: DeserializeOwned>(body: &str) -> Result<T, serde_json::Error> {
            serde_json::from_str(body)
        }
        Ok(match self {
            Self::Project => Row::Project(read(body)?),
            Self::Host => Row::Host(read(body)?),
            Self::Pool => Row::Pool(read(body)?),
            Self::Network => Row::Network(read(body)?),
            Self::Subnet => Row::Subnet(read(body)?),
            Self::Template => Row::Template(read(body)?),
            Self::Vm => Row::Vm(read(body)?),
            Self::Volume => Row::Volume(read(body)?),
            Self::Port => Row::Port(read(body)?),
            Self::Operation => Row::Operation(read(body)?),
            Self::JoinToken => Row::JoinToken(read(body)?),
            Self::ApiToken => Row::ApiToken(read(body)?),
            Self::Outbox => Row::Outbox(read(body)?),
            Self::Answer => Row::Answer(read(body)?),
            Self::Notice => Row::Notice(read(body)?),
            Self::User => Row::User(read(body)?),
            Self::Audit => Row::Audit(read(body)?),
            Self::Seed => Row::Seed(read(body)?),
            Self::SecurityGroup => Row::SecurityGroup(read(body)?),
        })
    }
}

fn upsert_sql(table: Table, rows: usize) -> String {
    let Definition {
        name,
        key,
        columns,
        replace,
    } = table.definition();
    let mut all = key.to_vec();
    all.extend(columns);
    all.extend(["body_version", "body"]);
    let insert = format!(
        "INSERT INTO {name} ({}) VALUES {}",
        all.join(", "),
        places(rows, all.len())
    );
    let set: Vec<String> = all[key.len()..]
        .iter()
        .map(|column| format!("{column} = excluded.{column}"))
        .collect();
    let conflict = format!("ON CONFLICT ({}) DO", key.join(", "));
    match replace {
        Replace::Always => format!("{insert} {conflict} UPDATE SET {}", set.join(", ")),
        Replace::When(condition) => format!("{insert} {conflict} UPDATE SET {} WHERE {condition}", set.join(", ")),
        Replace::Never => format!("{insert} {conflict} NOTHING"),
    }
}

/// Alternatives, not `IN (VALUES ...)`: SQLite reads the whole table for that when the key has two columns.
fn delete_sql(table: Table, rows: usize) -> String {
    let Definition { name, key, .. } = table.definition();
    let row = |row: usize| {
        let columns = key.iter().zip(row * key.len() + 1..);
        let conditions: Vec<String> = columns.map(|(column, place)| format!("{column} = ${place}")).collect();
        format!("({})", conditions.join(" AND "))
    };
    let alternatives: Vec<String> = (0..rows).map(row).collect();
    format!("DELETE FROM {name} WHERE {}", alternatives.join(" OR "))
}

/// `($1, $2), ($3, $4)`.
fn places(rows: usize, columns: usize) -> String {
    let row = |row: usize| {
        let of_row: Vec<String> = (1..=columns)
            .map(|column| format!("${}", row * columns + column))
            .collect();
        format!("({})", of_row.join(", "))
    };
    (0..rows).map(row).collect::<Vec<_>>().join(", ")
}

/// A change's key: its table and the values of its key columns.
pub(crate) fn key_of(change: &Change) -> Result<(Table, Vec<Value>), EncodeError> {
    match change {
        Change::Put(row) => key_values(&row.key()),
        Change::Delete(key) => key_values(key),
    }
}

fn key_values(key: &Key) -> Result<(Table, Vec<Value>), EncodeError> {
    Ok(match key {
        Key::Project(id) => (Table::Project, vec![text(id)]),
        Key::Host(id) => (Table::Host, vec![text(id)]),
        Key::Pool(id) => (Table::Pool, vec![text(id)]),
        Key::Network(id) => (Table::Network, vec![text(id)]),
        Key::Subnet(id) => (Table::Subnet, vec![text(id)]),
        Key::Template(id) => (Table::Template, vec![text(id)]),
        Key::Vm(id) => (Table::Vm, vec![text(id)]),
        Key::Volume(id) => (Table::Volume, vec![text(id)]),
        Key::Port(id) => (Table::Port, vec![text(id)]),
        Key::Operation(id) => (Table::Operation, vec![text(id)]),
        Key::JoinToken(id) => (Table::JoinToken, vec![text(id)]),
        Key::ApiToken(id) => (Table::ApiToken, vec![text(id)]),
        Key::Outbox(host, subject) => (Table::Outbox, vec![text(host), subject_text(*subject)]),
        Key::Answer(project, key) => (Table::Answer, vec![text(project), text(key)]),
        Key::Notice(sequence) => (Table::Notice, vec![number(sequence.0)?]),
        Key::User(id) => (Table::User, vec![text(id)]),
        Key::Audit(id) => (Table::Audit, vec![text(id)]),
        Key::Seed(vm) => (Table::Seed, vec![text(vm)]),
        Key::SecurityGroup(id) => (Table::SecurityGroup, vec![text(id)]),
    })
}

/// The stored form of a row.
pub(crate) fn record(row: &Row) -> Result<Record, EncodeError> {
    let (table, mut values) = key_values(&row.key())?;
    let body = columns(row, &mut values)?;
    values.push(Value::Number(BODY_VERSION));
    values.push(Value::Text(body));
    Ok(Record { table, values })
}

/// Pushes the columns after the key and returns the body.
// tidy: long because it is the list of all tables.
fn columns(row: &Row, to: &mut Vec<Value>) -> Result<String, EncodeError> {
    match row {
        Row::Project(row) => {
            to.push(text(row.name.as_str()));
            json(row)
        }
        Row::Host(row) => {
            to.push(text(row.name.as_str()));
            json(row)
        }
        Row::Pool(row) => {
            to.push(text(row.name.as_str()));
            json(row)
        }
        Row::Network(row) => {
            to.extend([text(row.project), text(row.name.as_str())]);
            json(row)
        }
        Row::Subnet(row) => {
            to.push(text(row.network));
            json(row)
        }
        Row::Template(row) => {
            to.extend([text(row.project), text(row.name.as_str())]);
            json(row)
        }
        Row::Vm(row) => vm_columns(row, to),
        Row::Volume(row) => {
            to.extend([
                text(row.project),
                text(row.pool),
                maybe(row.owner),
                number(row.generation.0)?,
            ]);
            json(row)
        }
        Row::Port(row) => port_columns(row, to),
        Row::Operation(row) => {
            to.extend([text(row.project), text(row.target.id), text(row.state.name())]);
            json::<Operation>(row)
        }
        Row::JoinToken(row) => {
            to.push(Value::Number(row.expires_at.0));
            json(row)
        }
        Row::ApiToken(row) => {
            to.push(hex(&row.hash.0));
            json(row)
        }
        Row::Outbox(row) => {
            to.push(number(outbox_revision(&row.order))?);
            json::<OutboxRow>(row)
        }
        Row::Answer(row) => {
            to.extend([hex(&row.body_hash), text(row.operation), Value::Number(row.at.0)]);
            json::<Answer>(row)
        }
        Row::Notice(row) => {
            to.push(maybe(row.project));
            json::<Notice>(row)
        }
        Row::User(row) => {
            to.push(text(row.name.as_str()));
            json::<User>(row)
        }
        Row::Audit(row) => {
            to.extend([maybe(row.project), text(&row.subject)]);
            json::<AuditEntry>(row)
        }
        Row::Seed(row) => json::<SeedRow>(row),
        Row::SecurityGroup(row) => {
            to.extend([text(row.project), text(row.name.as_str())]);
            json::<SecurityGroup>(row)
        }
    }
}

fn vm_columns(row: &model::Vm, to: &mut Vec<Value>) -> Result<String, EncodeError> {
    // The word that the interface uses for the state.
    let state = serde_json::to_value(row.status.state)?;
    to.extend([
        text(row.project),
        text(row.name.as_str()),
        maybe(row.status.host),
        text(state.as_str().unwrap_or_default()),
        number(row.status.generation.0)?,
        number(row.status.highest.0)?,
        number(row.revision.0)?,
        number(row.status.ordered.0)?,
    ]);
    json(row)
}

fn port_columns(row: &model::Port, to: &mut Vec<Value>) -> Result<String, EncodeError> {
    to.extend([
        text(row.project),
        text(row.network),
        text(row.subnet),
        maybe(row.vm),
        maybe(row.bound),
        number(row.generation.0)?,
        text(row.mac),
        text(row.ip),
    ]);
    json(row)
}

/// Orders that are not numbered replace each other freely.
fn outbox_revision(order: &Order) -> u64 {
    match order {
        Order::Vm(order) => order.revision.0,
        Order::Port(order) => order.port.policy.revision.0,
        Order::Template(_) | Order::Relay(_) | Order::Lend(_) => 0,
    }
}

fn subject_text(subject: Subject) -> Value {
    Value::Text(match subject {
        Subject::Vm(id) => format!("vm/{id}"),
        Subject::Template(id) => format!("template/{id}"),
        Subject::Port(id) => format!("port/{id}"),
    })
}

fn json<T: Serialize>(row: &T) -> Result<String, EncodeError> {
    Ok(serde_json::to_string(row)?)
}

fn text(value: impl ToString) -> Value {
    Value::Text(value.to_string())
}

fn maybe(value: Option<impl ToString>) -> Value {
    value.map_or(Value::Null, text)
}

fn number(value: u64) -> Result<Value, EncodeError> {
    i64::try_from(value).map(Value::Number).map_err(|_| EncodeError::Number)
}

fn hex(bytes: &[u8; 32]) -> Value {
    text(model::Digest(*bytes))
}

#[cfg(test)]
mod tests {
    use sqlx::{AssertSqlSafe, Connection as _, Row as _, SqliteConnection};

    use super::*;

    #[test]
    fn tables_are_numbered_in_their_own_order() {
        for (at, table) in Table::ALL.into_iter().enumerate() {
            assert_eq!(table as usize, at);
        }
    }

    #[test]
    fn statements_use_only_what_postgresql_understands_too() {
        let last = CHUNKS.len() - 1;
        assert_eq!(
            Table::Notice.upsert(last),
            "INSERT INTO notice (sequence, project_id, body_version, body) VALUES ($1, $2, $3, $4) \
             ON CONFLICT (sequence) DO NOTHING"
        );
        assert_eq!(
            delete_sql(Table::Outbox, 2),
            "DELETE FROM outbox WHERE (host_id = $1 AND subject = $2) OR (host_id = $3 AND subject = $4)"
        );
        for table in Table::ALL {
            assert!(!table.upsert(0).contains("OR REPLACE") && !table.upsert(0).contains('?'));
        }
    }

    #[tokio::test]
    async fn no_deletion_but_a_projects_reads_a_whole_table() {
        let mut database = SqliteConnection::connect(":memory:").await.unwrap();
        crate::schema::upgrade(&mut database).await.unwrap();
        // A project's deletion is rare: looking whether ports or volumes are left is not worth two more indexes to write.
        for table in Table::ALL.into_iter().filter(|table| *table != Table::Project) {
            for chunk in 0..CHUNKS.len() {
                let explain = AssertSqlSafe(format!("EXPLAIN QUERY PLAN {}", table.delete(chunk)));
                let plan = sqlx::query(explain).fetch_all(&mut database).await.unwrap();
                let steps: Vec<String> = plan.iter().map(|step| step.get("detail")).collect();
                let scan = steps.iter().find(|step| step.contains("SCAN"));
                assert_eq!(scan, None, "{table:?}");
            }
        }
    }
}
