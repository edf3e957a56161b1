//! The durable world: rows with the promises that the database itself keeps, written in batches, each one transaction.
//!
//! ```text
//!   controller ── Vec<Change> ──▶ Writer ── BEGIN IMMEDIATE ─┬─ epoch still ours? number the commit
//!       ▲                                                    ├─ deletions, then rows, compare-and-set
//!       │                                                    └─ COMMIT (fsync) ──▶ CommitSeq
//!       └──────── Loaded, notices, operations, answers ◀── reader connection (WAL: never waits for the writer)
//! ```
//!
//! Invariants:
//! - A commit that was acknowledged survives kill -9 and loss of power (WAL, synchronous=FULL); one that was refused left nothing.
//! - A deposed leader writes nothing: its epoch is compared in the same transaction.
//! - What was promised is not taken back: a VM's highest generation, revision and order number only grow, an operation
//!   that is over stays so, an idempotency key keeps its first answer for a day, a notice or audit
//!   entry is never rewritten.
//! - Names, MACs and addresses are unique, and references lead somewhere, by the database's own constraints.
//! - A full or failing disk makes the store read-only until [`Store::reload`] has written something again.
//! - Everything is bounded: notices, answers, audit entries and finished operations by [`Retention`], pages by `Page::LIMIT_MAX`.

mod database;
mod error;
mod read;
mod schema;
mod table;
mod writer;

use std::{fs::File, path::Path};

use model::{
    AuditEntry, Change, Epoch, Millis, Notice, Operation, OperationId, ProjectId, Row,
    audit::AuditFilter,
    change::Answer,
    id::Sequence,
    query::{Listing, Page},
};
use sqlx::SqliteConnection;
use tokio::sync::Mutex;

pub use error::{CommitError, LoadError, OpenError};
pub use schema::SCHEMA_VERSION;
pub use table::EncodeError;

use writer::Writer;

/// The number of a commit. Only grows, across restarts and leaders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct CommitSeq(pub u64);

/// The world as it was last committed.
#[derive(Debug)]
pub struct Loaded {
    /// The epoch under which this process leads.
    pub epoch: Epoch,
    /// All rows but answers, notices, audit entries and finished operations. What is referred to comes before what refers to it, and rows
    /// of a kind are in the order of their ids.
    pub rows: Vec<Row>,
    /// The newest notice; zero if there is none.
    pub last_notice: Sequence,
}

/// A part of the stream of notices.
#[derive(Debug, PartialEq, Eq)]
pub struct NoticePage {
    /// In order.
    pub notices: Vec<Notice>,
    /// Whether notices between the position asked for and the first of these have been removed already.
    pub missed: bool,
}

/// How much history is kept. Each bound may be exceeded by a few thousand rows until the next pruning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// The newest notices.
    pub notices_max: usize,
    /// The newest finished operations.
    pub operations_max: usize,
    /// The newest answers to requests with an idempotency key.
    pub answers_max: usize,
    /// How long answers are kept at most, reckoned from the newest one.
    pub answer_age_max: Millis,
    /// The newest entries of the audit log. Export what must be kept for longer: `godwit audit export`.
    pub audit_max: usize,
    /// How long they are kept at most, reckoned from the newest one.
    pub audit_age_max: Millis,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            notices_max: 100_000,
            operations_max: 100_000,
            answers_max: 200_000,
            answer_age_max: Millis::seconds(24 * 60 * 60),
            audit_max: 1_000_000,
            audit_age_max: Millis::seconds(366 * 24 * 60 * 60),
        }
    }
}

/// The store of a cell, open in this process alone.
#[derive(Debug)]
pub struct Store {
    writer: Mutex<Writer>,
    reader: Mutex<SqliteConnection>,
    /// Released when the store is dropped or the process dies.
    _lock: File,
}

impl Store {
    /// Opens the store in `dir`, making it if there is none, and takes the lead: earlier epochs can write no more.
    ///
    /// # Errors
    /// [`OpenError`], which says what to do: in use by another process, of a newer program, damaged, no space.
    pub async fn open(dir: &Path) -> Result<(Self, Loaded), OpenError> {
        Self::open_with(dir, Retention::default()).await
    }

    /// The same, keeping another amount of history.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub async fn open_with(dir: &Path, retention: Retention) -> Result<(Self, Loaded), OpenError> {
        let lock = database::lock(dir)?;
        let (mut connection, mut reader) = database::connect(dir).await?;
        let refused = |source| OpenError::Database {
            dir: dir.to_owned(),
            source,
        };
        let epoch = writer::lead(&mut connection).await.map_err(refused)?;
        writer::prune(&mut connection, retention).await.map_err(refused)?;
        let unreadable = |source| OpenError::Load {
            dir: dir.to_owned(),
            source,
        };
        let loaded = database::load(&mut reader, epoch).await.map_err(unreadable)?;
        let writer = Writer {
            dir: dir.to_owned(),
            connection,
            epoch,
            retention,
            read_only: None,
            added: 0,
        };
        Ok((
            Self {
                writer: Mutex::new(writer),
                reader: Mutex::new(reader),
                _lock: lock,
            },
            loaded,
        ))
    }

    /// Writes the effects of a group of events as one transaction: all of it is durable when this returns, or nothing is
    /// written. Within a batch the last change of a row counts. Bounded by the caller: a batch is held in memory.
    ///
    /// A call that is dropped before it returns may or may not have committed.
    ///
    /// # Errors
    /// [`CommitError`]. After each of them the world in memory is ahead of the store: [`Store::reload`].
    pub async fn commit(&self, batch: Vec<Change>) -> Result<CommitSeq, CommitError> {
        self.writer.lock().await.commit(batch).await
    }

    /// Reads the world as it is stored, without writing anything: for reads while the disk is full.
    ///
    /// # Errors
    /// [`LoadError`].
    pub async fn load(&self) -> Result<Loaded, LoadError> {
        let epoch = self.writer.lock().await.epoch;
        database::load(&mut *self.reader.lock().await, epoch).await
    }

    /// Reads the world as it is stored, after a failed commit; ends the read-only state when the disk can be written again.
    ///
    /// # Errors
    /// [`ReloadError`]; the store stays as it is.
    pub async fn reload(&self) -> Result<Loaded, ReloadError> {
        let mut writer = self.writer.lock().await;
        if writer.read_only.is_some() {
            // After a failed write or fsync only what a new connection reads from the file is known to be there.
            let (mut connection, reader) = database::connect(&writer.dir).await?;
            writer::probe(&mut connection, writer.epoch, &writer.dir).await?;
            writer.connection = connection;
            *self.reader.lock().await = reader;
            writer.read_only = None;
        } else {
            let Writer {
                connection, epoch, dir, ..
            } = &mut *writer;
            writer::probe(connection, *epoch, dir).await?;
        }
        let mut reader = self.reader.lock().await;
        Ok(database::load(&mut reader, writer.epoch).await?)
    }

    /// At most `limit` notices after a position, and at most `Page::LIMIT_MAX`.
    ///
    /// # Errors
    /// [`LoadError`].
    pub async fn notices_after(&self, after: Sequence, limit: usize) -> Result<NoticePage, LoadError> {
        read::notices_after(&mut *self.reader.lock().await, after, limit).await
    }

    /// A page of operations, finished ones too, the newest first; of one project, or of all.
    ///
    /// # Errors
    /// [`LoadError`].
    pub async fn operations(&self, project: Option<ProjectId>, page: Page) -> Result<Listing<Operation>, LoadError> {
        read::operations(&mut *self.reader.lock().await, project, page).await
    }

    /// A page of the audit log, the newest first.
    ///
    /// # Errors
    /// [`LoadError`].
    pub async fn audit(&self, filter: &AuditFilter, page: Page) -> Result<Listing<AuditEntry>, LoadError> {
        read::audit(&mut *self.reader.lock().await, filter, page).await
    }

    /// An operation, finished or not.
    ///
    /// # Errors
    /// [`LoadError`].
    pub async fn operation(&self, id: OperationId) -> Result<Option<Operation>, LoadError> {
        read::operation(&mut *self.reader.lock().await, id).await
    }

    /// The answer that a project's request with this idempotency key was given.
    ///
    /// # Errors
    /// [`LoadError`].
    pub async fn answer(&self, project: ProjectId, key: &str) -> Result<Option<Answer>, LoadError> {
        read::answer(&mut *self.reader.lock().await, project, key).await
    }
}

/// Why the world was not read again.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The database could not be opened again.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It cannot be written yet, or another controller leads.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// It could not be read.
    #[error(transparent)]
    Load(#[from] LoadError),
}
