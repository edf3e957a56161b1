//! The one writer: a batch of changes is one transaction, whole or not at all.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use model::{AuditId, Change, Epoch, OperationState, Row, Timestamp};
use sqlx::{Connection as _, Sqlite, SqliteConnection, query::Query, sqlite::SqliteArguments};

use crate::{
    CommitError, CommitSeq, Retention,
    database::unsigned,
    error::{Meaning, meaning},
    table::{self, CHUNKS, EncodeError, Record, Table, Value},
};

/// After so many rows of the bounded tables the surplus is removed; until then they are over their bound by no more.
const PRUNE_EVERY: usize = 4096;

#[derive(Debug)]
pub(crate) struct Writer {
    pub(crate) dir: PathBuf,
    pub(crate) connection: SqliteConnection,
    pub(crate) epoch: Epoch,
    pub(crate) retention: Retention,
    /// Why nothing may be written; set by a failing disk, cleared by a reload.
    pub(crate) read_only: Option<String>,
    /// Rows added to bounded tables since they were last pruned.
    pub(crate) added: usize,
}

/// A batch in the form in which it is written.
struct Prepared {
    deletes: BTreeMap<Table, Vec<Vec<Value>>>,
    puts: BTreeMap<Table, Vec<Vec<Value>>>,
    bounded: usize,
}

impl Writer {
    pub(crate) async fn commit(&mut self, batch: Vec<Change>) -> Result<CommitSeq, CommitError> {
        if let Some(reason) = &self.read_only {
            return Err(CommitError::ReadOnly {
                dir: self.dir.clone(),
                reason: reason.clone(),
            });
        }
        let prepared = prepare(batch)?;
        let outcome = self.write(&prepared).await;
        match outcome {
            Ok(sequence) => {
                self.added += prepared.bounded;
                if self.added >= PRUNE_EVERY {
                    self.added = 0;
                    // The batch is durable already; what was not pruned now will be.
                    if let Err(error) = prune(&mut self.connection, self.retention).await {
                        tracing::warn!(%error, "the store's old notices, answers and operations were not removed");
                    }
                }
                Ok(sequence)
            }
            Err(Failure::Refused(error)) => Err(error),
            Err(Failure::Database(error)) => Err(match meaning(&error) {
                Meaning::Constraint(constraint) => CommitError::Conflict { constraint },
                Meaning::Failing(reason) => {
                    tracing::error!(dir = %self.dir.display(), reason, "the store is read-only");
                    self.read_only = Some(reason.clone());
                    CommitError::ReadOnly {
                        dir: self.dir.clone(),
                        reason,
                    }
                }
            }),
        }
    }

    async fn write(&mut self, prepared: &Prepared) -> Result<CommitSeq, Failure> {
        // Dropped before its commit, by an error or by a caller that goes away, it rolls back.
        let mut transaction = self.connection.begin_with("BEGIN IMMEDIATE").await?;
        let sequence = advance(&mut transaction, self.epoch).await?;
        for (table, keys) in &prepared.deletes {
            for (chunk, keys) in chunks(keys) {
                bind(sqlx::query(table.delete(chunk)), keys)
                    .execute(&mut *transaction)
                    .await?;
            }
        }
        for (table, rows) in &prepared.puts {
            for (chunk, rows) in chunks(rows) {
                let done = bind(sqlx::query(table.upsert(chunk)), rows)
                    .execute(&mut *transaction)
                    .await?;
                if done.rows_affected() != CHUNKS[chunk] as u64 {
                    transaction.rollback().await?;
                    return Err(self.blame(prepared).await?);
                }
            }
        }
        transaction.commit().await?;
        Ok(sequence)
    }

    /// Finds the row that may not be replaced, by writing the batch row by row; nothing of it stays.
    async fn blame(&mut self, prepared: &Prepared) -> Result<Failure, sqlx::Error> {
        const SINGLE: usize = CHUNKS.len() - 1;
        let mut transaction = self.connection.begin_with("BEGIN IMMEDIATE").await?;
        for (table, keys) in &prepared.deletes {
            for key in keys {
                let key = std::slice::from_ref(key);
                bind(sqlx::query(table.delete(SINGLE)), key)
                    .execute(&mut *transaction)
                    .await?;
            }
        }
        let stale = |table: Table, row: Option<&Vec<Value>>| {
            let key = row.and_then(|row| row.first()).map(describe).unwrap_or_default();
            Failure::Refused(CommitError::Stale {
                table: table.name(),
                key,
            })
        };
        for (table, rows) in &prepared.puts {
            for row in rows {
                let one = std::slice::from_ref(row);
                let done = bind(sqlx::query(table.upsert(SINGLE)), one)
                    .execute(&mut *transaction)
                    .await?;
                if done.rows_affected() != 1 {
                    transaction.rollback().await?;
                    return Ok(stale(*table, Some(row)));
                }
            }
        }
        transaction.rollback().await?;
        let (table, rows) = prepared
            .puts
            .first_key_value()
            .map_or((Table::Vm, None), |(table, rows)| (*table, rows.first()));
        Ok(stale(table, rows))
    }
}

/// Cuts rows into pieces that statements exist for, the largest first; each with its place in [`CHUNKS`].
fn chunks(mut rows: &[Vec<Value>]) -> impl Iterator<Item = (usize, &[Vec<Value>])> {
    std::iter::from_fn(move || {
        let chunk = CHUNKS.iter().position(|size| *size <= rows.len())?;
        let (now, later) = rows.split_at(CHUNKS[chunk]);
        rows = later;
        Some((chunk, now))
    })
}

enum Failure {
    Refused(CommitError),
    Database(sqlx::Error),
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

/// Numbers the commit, if this epoch still leads: exactly one row, or none of the batch.
async fn advance(connection: &mut SqliteConnection, epoch: Epoch) -> Result<CommitSeq, Failure> {
    let epoch = i64::try_from(epoch.0).map_err(|_| Failure::Refused(CommitError::Deposed))?;
    let sql = "UPDATE leader SET commits = commits + 1 WHERE id = 1 AND epoch = $1 RETURNING commits";
    let number: Option<i64> = sqlx::query_scalar(sql).bind(epoch).fetch_optional(connection).await?;
    number
        .map(|number| CommitSeq(unsigned(number)))
        .ok_or(Failure::Refused(CommitError::Deposed))
}

/// Takes the lead: from now on no other epoch can write.
pub(crate) async fn lead(connection: &mut SqliteConnection) -> Result<Epoch, sqlx::Error> {
    let sql = "UPDATE leader SET epoch = epoch + 1 WHERE id = 1 RETURNING epoch";
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await?;
    let epoch: i64 = sqlx::query_scalar(sql).fetch_one(&mut *transaction).await?;
    transaction.commit().await?;
    Ok(Epoch(unsigned(epoch)))
}

/// Really writes something, and finds out whether this epoch still leads.
pub(crate) async fn probe(connection: &mut SqliteConnection, epoch: Epoch, dir: &Path) -> Result<(), CommitError> {
    let attempt = async {
        let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await?;
        advance(&mut transaction, epoch).await?;
        transaction.commit().await?;
        Ok(())
    };
    attempt.await.map_err(|failure| match failure {
        Failure::Refused(error) => error,
        Failure::Database(error) => match meaning(&error) {
            Meaning::Constraint(reason) | Meaning::Failing(reason) => CommitError::ReadOnly {
                dir: dir.to_owned(),
                reason,
            },
        },
    })
}

/// The last change of each row counts; deletions come first, so that a name is free for its next owner.
fn prepare(batch: Vec<Change>) -> Result<Prepared, CommitError> {
    let mut keys = Vec::with_capacity(batch.len());
    let mut last = HashMap::with_capacity(batch.len());
    for (at, change) in batch.iter().enumerate() {
        let key = table::key_of(change).map_err(|source| encode_error(change, source))?;
        last.insert(hashable(&key), at);
        keys.push(key);
    }
    let mut prepared = Prepared {
        deletes: BTreeMap::new(),
        puts: BTreeMap::new(),
        bounded: 0,
    };
    for (at, (change, key)) in batch.iter().zip(keys).enumerate() {
        if last.get(&hashable(&key)) != Some(&at) {
            continue;
        }
        match change {
            Change::Delete(_) => prepared.deletes.entry(key.0).or_default().push(key.1),
            Change::Put(row) => {
                prepared.bounded += usize::from(is_bounded(row));
                let record = table::record(row).map_err(|source| encode_error(change, source))?;
                let Record { table, values } = record;
                prepared.puts.entry(table).or_default().push(values);
            }
        }
    }
    Ok(prepared)
}

fn encode_error(change: &Change, source: EncodeError) -> CommitError {
    let table = table::key_of(change).map_or("notice", |(table, _)| table.name());
    CommitError::Encode { table, source }
}

fn hashable((table, key): &(Table, Vec<Value>)) -> (usize, String) {
    (*table as usize, key.iter().map(describe).collect::<Vec<_>>().join("\0"))
}

fn describe(value: &Value) -> String {
    match value {
        Value::Text(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        Value::Null => String::new(),
    }
}

/// Whether it adds to a table that is kept bounded.
fn is_bounded(row: &Row) -> bool {
    match row {
        Row::Notice(_) | Row::Answer(_) | Row::Audit(_) => true,
        Row::Operation(operation) => !matches!(operation.state, OperationState::Running),
        _ => false,
    }
}

fn bind<'q>(
    mut query: Query<'q, Sqlite, SqliteArguments>,
    rows: &'q [Vec<Value>],
) -> Query<'q, Sqlite, SqliteArguments> {
    for value in rows.iter().flatten() {
        query = match value {
            Value::Text(text) => query.bind(text.as_str()),
            Value::Number(number) => query.bind(number),
            Value::Null => query.bind(None::<&str>),
        };
    }
    query
}

/// Removes what is beyond the bounds: the oldest notices, answers and finished operations.
pub(crate) async fn prune(connection: &mut SqliteConnection, retention: Retention) -> Result<(), sqlx::Error> {
    let limit = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await?;
    sqlx::query("DELETE FROM notice WHERE sequence <= (SELECT MAX(sequence) FROM notice) - $1")
        .bind(limit(retention.notices_max))
        .execute(&mut *transaction)
        .await?;
    sqlx::query(
        "DELETE FROM operation WHERE state <> 'running' AND id <= \
         (SELECT id FROM operation WHERE state <> 'running' ORDER BY id DESC LIMIT 1 OFFSET $1)",
    )
    .bind(limit(retention.operations_max))
    .execute(&mut *transaction)
    .await?;
    // Ages are told by the newest answer, not by a clock.
    sqlx::query("DELETE FROM answer WHERE answered_at < (SELECT MAX(answered_at) FROM answer) - $1")
        .bind(i64::try_from(retention.answer_age_max.0).unwrap_or(i64::MAX))
        .execute(&mut *transaction)
        .await?;
    sqlx::query(
        "DELETE FROM answer WHERE answered_at <= \
         (SELECT answered_at FROM answer ORDER BY answered_at DESC LIMIT 1 OFFSET $1)",
    )
    .bind(limit(retention.answers_max))
    .execute(&mut *transaction)
    .await?;
    prune_audit(&mut transaction, retention).await?;
    transaction.commit().await
}

/// An entry's id begins with its time: what is too old is below an id.
async fn prune_audit(connection: &mut SqliteConnection, retention: Retention) -> Result<(), sqlx::Error> {
    let sql = "DELETE FROM audit_entry WHERE id <= (SELECT id FROM audit_entry ORDER BY id DESC LIMIT 1 OFFSET $1)";
    sqlx::query(sql)
        .bind(i64::try_from(retention.audit_max).unwrap_or(i64::MAX))
        .execute(&mut *connection)
        .await?;
    let newest: Option<String> = sqlx::query_scalar("SELECT MAX(id) FROM audit_entry")
        .fetch_one(&mut *connection)
        .await?;
    let Some(newest) = newest.and_then(|id| id.parse::<AuditId>().ok()) else {
        return Ok(());
    };
    let age_max = i64::try_from(retention.audit_age_max.0).unwrap_or(i64::MAX);
    let oldest = Timestamp(newest.time().0.saturating_sub(age_max).max(0));
    sqlx::query("DELETE FROM audit_entry WHERE id < $1")
        .bind(AuditId::first_at(oldest).to_string())
        .execute(connection)
        .await?;
    Ok(())
}
