//! Watching: the cell's notices and operations' progress, as far as the watcher may see them, and as long.

use std::{collections::VecDeque, sync::Arc};

use futures_util::{Stream, stream};
use model::{Actor, Notice, OperationId, ProjectId, Role, Sequence, operation::Progress};
use tokio::sync::broadcast::{Receiver, error::RecvError};

use crate::{
    clock::Clock,
    committed::{Committed, Told},
};

/// What a watcher is told.
#[derive(Clone, Debug)]
pub enum WatchItem {
    /// Something happened. Committed; each once, in order.
    Notice(Arc<Notice>),
    /// How far an operation is. Telemetry: some may be missing.
    Progress {
        /// The operation.
        operation: OperationId,
        /// How far.
        progress: Progress,
    },
    /// Notices are missing that are no longer kept: read anew what you follow. The stream goes on after this position.
    Lagged {
        /// The last notice before those that follow.
        at: Sequence,
    },
}

struct Watcher {
    actor: Actor,
    committed: Arc<Committed>,
    clock: Arc<Clock>,
    told: Receiver<Told>,
    backlog: VecDeque<WatchItem>,
    /// The last notice passed on or skipped; `None` before the first.
    last: Option<Sequence>,
}

/// Watches from after the notice `after` on, or from now on.
pub(crate) fn watch(
    committed: Arc<Committed>,
    clock: Arc<Clock>,
    actor: Actor,
    after: Option<Sequence>,
) -> impl Stream<Item = WatchItem> + Send + Unpin + 'static {
    let (told, backlog) = committed.subscribe(after);
    let mut watcher = Watcher {
        actor,
        committed,
        clock,
        told,
        backlog: VecDeque::new(),
        last: after,
    };
    watcher.resume(backlog);
    Box::pin(stream::unfold(watcher, |mut watcher| async move {
        let item = watcher.next().await?;
        Some((item, watcher))
    }))
}

impl Watcher {
    async fn next(&mut self) -> Option<WatchItem> {
        loop {
            // A right that was taken away ends what it opened.
            if !self.committed.still_has(&self.actor, self.clock.now()) {
                return None;
            }
            if let Some(item) = self.backlog.pop_front() {
                return Some(item);
            }
            match self.told.recv().await {
                Ok(Told::Notice(notice)) => self.take(notice),
                Ok(Told::Progress(operation, project, progress)) => {
                    if self.sees(Some(project)) {
                        return Some(WatchItem::Progress { operation, progress });
                    }
                }
                Err(RecvError::Lagged(_)) => {
                    let (told, backlog) = self.committed.subscribe(self.last);
                    self.told = told;
                    // A watcher that has seen no notice cannot say which are missing.
                    let backlog = if self.last.is_some() { backlog } else { None };
                    self.resume(backlog);
                }
                Err(RecvError::Closed) => return None,
            }
        }
    }

    fn resume(&mut self, backlog: Option<Vec<Arc<Notice>>>) {
        match backlog {
            Some(notices) => notices.into_iter().for_each(|notice| self.take(notice)),
            None => {
                let at = self.committed.newest();
                self.last = Some(at);
                self.backlog.push_back(WatchItem::Lagged { at });
            }
        }
    }

    fn take(&mut self, notice: Arc<Notice>) {
        if self.last.is_some_and(|last| notice.sequence <= last) {
            return;
        }
        self.last = Some(notice.sequence);
        if self.sees(notice.project) {
            self.backlog.push_back(WatchItem::Notice(notice));
        }
    }

    fn sees(&self, project: Option<ProjectId>) -> bool {
        self.actor.role == Role::CloudAdmin || project == Some(self.actor.project)
    }
}
