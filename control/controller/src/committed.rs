//! What is committed, indexed for those who cannot wait for the loop: tokens, hosts, templates' blobs, and the ring of notices.
//!
//! It is made from rows and changes after their commit, so nothing is seen here that could still be lost.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use model::{
    Change, Digest, HostId, Key, Notice, OperationId, ProjectId, Row, Sequence, TemplateId, TokenId, VmId, VmState,
    access::ApiToken,
    host::Link,
    operation::{OperationState, Progress},
    template::TemplateState,
};
use tokio::sync::broadcast;

use crate::metrics::Metrics;

/// Notices and progress that a slow watcher may be behind before it has to resume from the ring.
const BROADCAST_MAX: usize = 4096;

/// What is told to watchers.
#[derive(Clone, Debug)]
pub(crate) enum Told {
    Notice(Arc<Notice>),
    Progress(OperationId, ProjectId, Progress),
}

/// The committed view.
#[derive(Debug)]
pub(crate) struct Committed {
    index: Mutex<Index>,
    told: broadcast::Sender<Told>,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct Index {
    tokens: BTreeMap<TokenId, ApiToken>,
    hosts: BTreeMap<HostId, Link>,
    vms: BTreeMap<VmId, VmState>,
    templates: BTreeMap<TemplateId, TemplateBlobs>,
    running: BTreeSet<OperationId>,
    notices: VecDeque<Arc<Notice>>,
}

#[derive(Debug)]
struct TemplateBlobs {
    /// Whether hosts may still have to fetch them.
    wanted: bool,
    blobs: Vec<Digest>,
}

impl Committed {
    pub(crate) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            index: Mutex::default(),
            told: broadcast::channel(BROADCAST_MAX).0,
            metrics,
        }
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        // Each change leaves the index whole, so a panic elsewhere does not make it false.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins anew from all rows; watchers stay, and are told of notices of a commit that failed only as far as could be seen.
    pub(crate) fn load(&self, rows: &[Row]) {
        let mut fresh = Index::default();
        for row in rows {
            fresh.put(row, None);
        }
        fresh.notices.make_contiguous().sort_by_key(|notice| notice.sequence);
        let mut index = self.index();
        let told = index.newest();
        for notice in fresh.notices.iter().filter(|notice| notice.sequence > told) {
            let _ = self.told.send(Told::Notice(notice.clone()));
        }
        *index = fresh;
    }

    /// Takes committed changes in, and tells watchers of new notices.
    pub(crate) fn apply<'a>(&self, changes: impl Iterator<Item = &'a Change>) {
        let mut index = self.index();
        for change in changes {
            match change {
                Change::Put(row) => {
                    index.put(row, Some(&self.metrics));
                    if let (Row::Notice(_), Some(notice)) = (row, index.notices.back()) {
                        // Told under the lock: a new watcher sees each notice in the ring or in the channel, never in neither.
                        let _ = self.told.send(Told::Notice(notice.clone()));
                    }
                }
                Change::Delete(key) => index.delete(key),
            }
        }
    }

    /// Tells watchers how far an operation is.
    pub(crate) fn progress(&self, operation: OperationId, project: ProjectId, progress: Progress) {
        let _ = self.told.send(Told::Progress(operation, project, progress));
    }

    /// All that comes from now on, and the notices after `after` that are still kept. `None` as backlog: some are not.
    pub(crate) fn subscribe(&self, after: Option<Sequence>) -> (broadcast::Receiver<Told>, Option<Vec<Arc<Notice>>>) {
        let index = self.index();
        let backlog = match after {
            None => Some(Vec::new()),
            Some(after) => index.notices_after(after),
        };
        (self.told.subscribe(), backlog)
    }

    /// The position of the newest notice.
    pub(crate) fn newest(&self) -> Sequence {
        self.index().newest()
    }

    pub(crate) fn token(&self, id: TokenId) -> Option<ApiToken> {
        self.index().tokens.get(&id).cloned()
    }

    pub(crate) fn knows_host(&self, host: HostId) -> bool {
        self.index().hosts.contains_key(&host)
    }

    /// Hosts whose link is stored as up.
    pub(crate) fn hosts_up(&self) -> Vec<HostId> {
        let index = self.index();
        let up = index.hosts.iter().filter(|(_, link)| **link == Link::Up);
        up.map(|(host, _)| *host).collect()
    }

    /// Whether a template names this blob.
    pub(crate) fn names_blob(&self, digest: Digest) -> bool {
        self.index()
            .templates
            .values()
            .any(|template| template.blobs.contains(&digest))
    }

    /// Blobs that hosts may still have to fetch.
    pub(crate) fn wanted_blobs(&self) -> BTreeSet<Digest> {
        let index = self.index();
        let wanted = index.templates.values().filter(|template| template.wanted);
        wanted.flat_map(|template| template.blobs.iter().copied()).collect()
    }

    /// Counts things by their state, for a scrape.
    pub(crate) fn count(&self) {
        let index = self.index();
        self.metrics.count_hosts(index.hosts.values().copied());
        self.metrics.count_vms(index.vms.values().copied());
    }
}

impl Index {
    fn put(&mut self, row: &Row, metrics: Option<&Metrics>) {
        match row {
            Row::ApiToken(token) => {
                self.tokens.insert(token.id, token.clone());
            }
            Row::Host(host) => {
                self.hosts.insert(host.id, host.status.link);
            }
            Row::Vm(vm) => {
                self.vms.insert(vm.id, vm.status.state);
            }
            Row::Template(template) => {
                let blobs = TemplateBlobs {
                    wanted: template.state == TemplateState::Importing,
                    blobs: template.content.blobs().map(|blob| blob.digest).collect(),
                };
                self.templates.insert(template.id, blobs);
            }
            Row::Operation(operation) => {
                if operation.state == OperationState::Running {
                    self.running.insert(operation.id);
                } else if self.running.remove(&operation.id)
                    && let Some(metrics) = metrics
                {
                    metrics.operation_ended(operation);
                }
            }
            Row::Notice(notice) => self.notices.push_back(Arc::new(notice.as_ref().clone())),
            _ => {}
        }
    }

    fn newest(&self) -> Sequence {
        self.notices.back().map(|notice| notice.sequence).unwrap_or_default()
    }

    fn delete(&mut self, key: &Key) {
        match key {
            Key::ApiToken(id) => drop(self.tokens.remove(id)),
            Key::Host(id) => drop(self.hosts.remove(id)),
            Key::Vm(id) => drop(self.vms.remove(id)),
            Key::Template(id) => drop(self.templates.remove(id)),
            Key::Operation(id) => drop(self.running.remove(id)),
            Key::Notice(sequence) => {
                // The oldest go first, so it is at the front.
                if self.notices.front().is_some_and(|notice| notice.sequence == *sequence) {
                    self.notices.pop_front();
                } else {
                    self.notices.retain(|notice| notice.sequence != *sequence);
                }
            }
            _ => {}
        }
    }

    /// `None` when some after `after` are no longer kept, or `after` is of a future that was never (a restored backup).
    fn notices_after(&self, after: Sequence) -> Option<Vec<Arc<Notice>>> {
        let (Some(oldest), Some(newest)) = (self.notices.front(), self.notices.back()) else {
            return (after == Sequence(0)).then(Vec::new);
        };
        if after.next() < oldest.sequence || after > newest.sequence {
            return None;
        }
        let from = self.notices.partition_point(|notice| notice.sequence <= after);
        Some(self.notices.range(from..).cloned().collect())
    }
}
