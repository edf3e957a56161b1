//! What is committed, indexed for those who cannot wait for the loop: tokens, users, projects, hosts, templates' blobs, and the ring of notices.
//!
//! It is made from rows and changes after their commit, so nothing is seen here that could still be lost.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use model::{
    Actor, Change, Digest, HostId, Key, Name, Notice, OperationId, PortId, ProjectId, Role, Row, Sequence, TemplateId,
    Timestamp, TokenId, User, UserId, VmId, VmState,
    access::ApiToken,
    host::Link,
    name::Reference,
    operation::{OperationState, Progress},
    order::{Order, Subject, TemplateVerb},
    template::TemplateState,
};
use tokio::sync::{broadcast, watch};

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
    /// Counts changes of tokens and users: what somebody was let into may have to end.
    rights: watch::Sender<u64>,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct Index {
    tokens: BTreeMap<TokenId, ApiToken>,
    users: BTreeMap<UserId, Box<User>>,
    user_names: BTreeMap<Name, UserId>,
    projects: BTreeMap<ProjectId, Name>,
    project_names: BTreeMap<Name, ProjectId>,
    hosts: BTreeMap<HostId, (Link, Name)>,
    vms: BTreeMap<VmId, (VmState, Place)>,
    templates: BTreeMap<TemplateId, TemplateBlobs>,
    /// Whose a port is, and on which host it is open.
    ports: BTreeMap<PortId, (ProjectId, HostId)>,
    /// The hosts that import templates now.
    importing: BTreeSet<(HostId, TemplateId)>,
    running: BTreeSet<OperationId>,
    notices: VecDeque<Arc<Notice>>,
}

/// Whose a VM is, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) project: ProjectId,
    pub(crate) name: Name,
    pub(crate) host: Option<HostId>,
    pub(crate) vcpus: u16,
}

#[derive(Debug)]
struct TemplateBlobs {
    /// Whether hosts may have to fetch them: those of a ready template are kept for hosts that are yet to get it.
    wanted: bool,
    blobs: Vec<Digest>,
}

impl Committed {
    pub(crate) fn new(metrics: Arc<Metrics>) -> Self {
        Self {
            index: Mutex::default(),
            told: broadcast::channel(BROADCAST_MAX).0,
            rights: watch::channel(0).0,
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
        drop(index);
        self.rights.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Takes committed changes in, and tells watchers of new notices.
    pub(crate) fn apply<'a>(&self, changes: impl Iterator<Item = &'a Change>) {
        let mut index = self.index();
        let mut rights = false;
        for change in changes {
            rights |= concerns_rights(change);
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
        drop(index);
        if rights {
            self.rights.send_modify(|count| *count = count.wrapping_add(1));
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

    /// A user by its name.
    pub(crate) fn user(&self, name: &Name) -> Option<User> {
        let index = self.index();
        let id = index.user_names.get(name)?;
        index.users.get(id).map(|user| user.as_ref().clone())
    }

    /// A user.
    pub(crate) fn user_by_id(&self, id: UserId) -> Option<User> {
        self.index().users.get(&id).map(|user| user.as_ref().clone())
    }

    /// A project by name or id.
    pub(crate) fn project(&self, reference: &Reference) -> Option<ProjectId> {
        let index = self.index();
        match reference {
            Reference::Id(id) => Some(ProjectId(*id)).filter(|id| index.projects.contains_key(id)),
            Reference::Name(name) => index.project_names.get(name).copied(),
        }
    }

    /// What a token is worth in a project now.
    pub(crate) fn role(&self, token: &ApiToken, project: ProjectId, now: Timestamp) -> Option<Role> {
        let index = self.index();
        let owner = token.owner.and_then(|id| index.users.get(&id));
        let known = index.projects.contains_key(&project);
        token.role_in(project, owner.map(|user| &**user), now).filter(|_| known)
    }

    /// Where a session acts when it is not told: where it did when it began, or where its user has a role.
    pub(crate) fn home(&self, token: &ApiToken, now: Timestamp) -> Option<ProjectId> {
        let first = token.actor.project;
        if self.role(token, first, now).is_some() {
            return Some(first);
        }
        let granted: Vec<ProjectId> = {
            let index = self.index();
            let owner = token.owner.and_then(|id| index.users.get(&id))?;
            owner.grants.keys().copied().collect()
        };
        granted
            .into_iter()
            .find(|project| self.role(token, *project, now).is_some())
    }

    /// Whether an actor still has the right with which it came.
    pub(crate) fn still_has(&self, actor: &Actor, now: Timestamp) -> bool {
        let Some(id) = actor.via.token else { return true };
        let token = self.token(id);
        let role = token.and_then(|token| self.role(&token, actor.project, now));
        role.is_some_and(|role| role >= actor.role)
    }

    /// Changes when somebody's right may have.
    pub(crate) fn rights(&self) -> watch::Receiver<u64> {
        self.rights.subscribe()
    }

    pub(crate) fn knows_host(&self, host: HostId) -> bool {
        self.index().hosts.contains_key(&host)
    }

    /// A host's name.
    pub(crate) fn host_name(&self, host: HostId) -> Option<Name> {
        self.index().hosts.get(&host).map(|(_, name)| name.clone())
    }

    /// A project's name.
    pub(crate) fn project_name(&self, project: ProjectId) -> Option<Name> {
        self.index().projects.get(&project).cloned()
    }

    /// Whose a VM is, and where.
    pub(crate) fn place_of(&self, vm: VmId) -> Option<Place> {
        self.index().vms.get(&vm).map(|(_, place)| place.clone())
    }

    /// Whose these ports are, and on which host each is open; those that are open nowhere are left out.
    pub(crate) fn bound(&self, ports: impl Iterator<Item = PortId>) -> BTreeMap<PortId, (ProjectId, HostId)> {
        let index = self.index();
        let bound = ports.filter_map(|port| Some((port, *index.ports.get(&port)?)));
        bound.collect()
    }

    /// Hosts whose link is stored as up.
    pub(crate) fn hosts_up(&self) -> Vec<HostId> {
        let index = self.index();
        let up = index.hosts.iter().filter(|(_, (link, _))| *link == Link::Up);
        up.map(|(host, _)| *host).collect()
    }

    /// Whether a template names this blob.
    pub(crate) fn names_blob(&self, digest: Digest) -> bool {
        self.index()
            .templates
            .values()
            .any(|template| template.blobs.contains(&digest))
    }

    /// Whether a host imports a template now, and may bring what its disk became.
    pub(crate) fn imports(&self, host: HostId) -> bool {
        self.index().importing.iter().any(|(of, _)| *of == host)
    }

    /// Blobs that hosts may have to fetch.
    pub(crate) fn wanted_blobs(&self) -> BTreeSet<Digest> {
        let index = self.index();
        let wanted = index.templates.values().filter(|template| template.wanted);
        wanted.flat_map(|template| template.blobs.iter().copied()).collect()
    }

    /// Counts things by their state, for a scrape.
    pub(crate) fn count(&self) {
        let index = self.index();
        self.metrics.count_hosts(index.hosts.values().map(|(link, _)| *link));
        self.metrics.count_vms(index.vms.values().map(|(state, _)| *state));
    }
}

/// Whether a change may end somebody's right.
fn concerns_rights(change: &Change) -> bool {
    match change {
        Change::Put(row) => matches!(row, Row::ApiToken(_) | Row::User(_)),
        Change::Delete(key) => matches!(key, Key::ApiToken(_) | Key::User(_) | Key::Project(_)),
    }
}

impl Index {
    fn put(&mut self, row: &Row, metrics: Option<&Metrics>) {
        match row {
            Row::ApiToken(token) => {
                self.tokens.insert(token.id, token.clone());
            }
            Row::User(user) => {
                self.delete(&Key::User(user.id));
                self.user_names.insert(user.name.clone(), user.id);
                self.users.insert(user.id, user.clone());
            }
            Row::Project(project) => {
                self.delete(&Key::Project(project.id));
                self.project_names.insert(project.name.clone(), project.id);
                self.projects.insert(project.id, project.name.clone());
            }
            Row::Host(host) => {
                self.hosts.insert(host.id, (host.status.link, host.name.clone()));
            }
            Row::Vm(vm) => {
                let place = Place {
                    project: vm.project,
                    name: vm.name.clone(),
                    host: vm.status.host,
                    vcpus: vm.spec.vcpus,
                };
                self.vms.insert(vm.id, (vm.status.state, place));
            }
            Row::Port(port) => match port.bound {
                Some(host) => drop(self.ports.insert(port.id, (port.project, host))),
                None => drop(self.ports.remove(&port.id)),
            },
            Row::Template(template) => {
                let blobs = TemplateBlobs {
                    wanted: matches!(template.state, TemplateState::Importing | TemplateState::Ready { .. }),
                    blobs: template.content.blobs().map(|blob| blob.digest).collect(),
                };
                self.templates.insert(template.id, blobs);
            }
            Row::Outbox(row) => {
                if let Order::Template(order) = &row.order {
                    let which = (row.host, order.template);
                    match order.verb {
                        TemplateVerb::Fetch { .. } => drop(self.importing.insert(which)),
                        TemplateVerb::Drop { .. } => drop(self.importing.remove(&which)),
                    }
                }
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
            Key::User(id) => {
                if let Some(user) = self.users.remove(id) {
                    self.user_names.remove(&user.name);
                }
            }
            Key::Project(id) => {
                if let Some(name) = self.projects.remove(id) {
                    self.project_names.remove(&name);
                }
            }
            Key::Host(id) => drop(self.hosts.remove(id)),
            Key::Vm(id) => drop(self.vms.remove(id)),
            Key::Port(id) => drop(self.ports.remove(id)),
            Key::Template(id) => drop(self.templates.remove(id)),
            Key::Outbox(host, Subject::Template(id)) => drop(self.importing.remove(&(*host, *id))),
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
