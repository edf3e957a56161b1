//! What the loop needs of a durable store, and the store of this project behind it.

use std::{future::Future, pin::Pin};

use model::{
    AuditEntry, Change, Epoch, Operation, OperationId, ProjectId, Row, Sequence,
    audit::AuditFilter,
    change::Answer,
    query::{Listing, Page},
};
use store::{CommitError, Loaded, Store};
use thiserror::Error;

/// An answer that is waited for.
pub type Waited<'a, T> = Pin<Box<dyn Future<Output = Result<T, StorageError>> + Send + 'a>>;

/// The world as it is committed.
#[derive(Debug)]
pub struct Stored {
    /// The epoch under which this process leads.
    pub epoch: Epoch,
    /// All rows, but for old answers, notices and finished operations, and the audit log.
    pub rows: Vec<Row>,
}

/// A durable world: rows, changed in transactions.
pub trait Storage: Send + Sync + 'static {
    /// What is committed, to be read.
    fn load(&self) -> Waited<'_, Stored>;

    /// Writes something to prove that writing is possible (again), then loads.
    fn recover(&self) -> Waited<'_, Stored>;

    /// All changes, in order, durably; or none. After an error the world in memory is ahead of what is stored.
    fn commit(&self, changes: Vec<Change>) -> Waited<'_, ()>;

    /// The answer to an earlier request with an idempotency key, also one of an earlier process.
    fn answer(&self, project: ProjectId, key: String) -> Waited<'_, Option<Answer>>;

    /// An operation, finished ones of earlier processes too.
    fn operation(&self, id: OperationId) -> Waited<'_, Option<Operation>>;

    /// A page of operations, the newest first, of one project or of all.
    fn operations(&self, project: Option<ProjectId>, page: Page) -> Waited<'_, Listing<Operation>>;

    /// A page of the audit log, the newest first.
    fn audit(&self, filter: AuditFilter, page: Page) -> Waited<'_, Listing<AuditEntry>>;
}

type Source = Box<dyn std::error::Error + Send + Sync>;

/// Why the store did not do it; the source says what happened.
#[derive(Debug, Error)]
pub enum StorageError {
    /// Another leader has taken over: this process may write nothing any more.
    #[error("another controller leads this cell now")]
    Deposed,
    /// The batch contradicts what is stored; nothing of it was written.
    #[error("the store refused the batch")]
    Refused(#[source] Source),
    /// A full or failing disk, a broken database: nothing can be written for now.
    #[error("the store cannot be used")]
    Failing(#[source] Source),
}

impl StorageError {
    /// The whole story in one line, for people.
    #[must_use]
    pub fn story(&self) -> String {
        model::story(self)
    }
}

fn failing(error: impl Into<Source>) -> StorageError {
    StorageError::Failing(error.into())
}

impl From<CommitError> for StorageError {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Deposed => Self::Deposed,
            CommitError::ReadOnly { .. } => failing(error),
            _ => Self::Refused(error.into()),
        }
    }
}

/// Adds the newest notices: the world numbers new ones after them, and watchers resume from them.
pub(crate) async fn with_notices(store: &Store, loaded: Loaded) -> Result<Stored, StorageError> {
    let Loaded {
        epoch,
        mut rows,
        last_notice,
    } = loaded;
    let mut after = Sequence(last_notice.0.saturating_sub(engine::NOTICES_MAX as u64));
    while after < last_notice {
        let page = store.notices_after(after, Page::LIMIT_MAX).await.map_err(failing)?;
        let Some(last) = page.notices.last() else { break };
        after = last.sequence;
        rows.extend(page.notices.into_iter().map(|notice| Row::Notice(Box::new(notice))));
    }
    Ok(Stored { epoch, rows })
}

impl Storage for Store {
    fn load(&self) -> Waited<'_, Stored> {
        Box::pin(async move {
            let loaded = self.load().await.map_err(failing)?;
            with_notices(self, loaded).await
        })
    }

    fn recover(&self) -> Waited<'_, Stored> {
        Box::pin(async move {
            let loaded = self.reload().await.map_err(|error| match error {
                store::ReloadError::Commit(error) => error.into(),
                error => failing(error),
            })?;
            with_notices(self, loaded).await
        })
    }

    fn commit(&self, changes: Vec<Change>) -> Waited<'_, ()> {
        Box::pin(async move { Ok(self.commit(changes).await.map(drop)?) })
    }

    fn answer(&self, project: ProjectId, key: String) -> Waited<'_, Option<Answer>> {
        Box::pin(async move { self.answer(project, &key).await.map_err(failing) })
    }

    fn operation(&self, id: OperationId) -> Waited<'_, Option<Operation>> {
        Box::pin(async move { self.operation(id).await.map_err(failing) })
    }

    fn operations(&self, project: Option<ProjectId>, page: Page) -> Waited<'_, Listing<Operation>> {
        Box::pin(async move { self.operations(project, page).await.map_err(failing) })
    }

    fn audit(&self, filter: AuditFilter, page: Page) -> Waited<'_, Listing<AuditEntry>> {
        Box::pin(async move { self.audit(&filter, page).await.map_err(failing) })
    }
}
