//! The durable world in memory: its rows, and the only way in which they change.

use std::collections::BTreeMap;

use model::{
    Change, Epoch, Host, HostId, Key, Name, Network, NetworkId, Notice, Operation, OperationId, Order, Pool, PoolId,
    Port, PortId, Project, ProjectId, Row, SecurityGroup, SecurityGroupId, Subnet, SubnetId, Template, TemplateId,
    Timestamp, TokenId, User, UserId, Vm, VmId, Volume, VolumeId,
    access::{ApiToken, JoinToken},
    change::{Answer, OutboxRow},
    id::Sequence,
    operation::Progress,
    order::{Subject, Verb},
    seed::SeedRow,
};
use thiserror::Error;

use crate::index::{Held, Index};

/// All that the cell remembers, and what is derived from it. About 2 KB a VM.
#[derive(Clone, Debug, Default)]
pub struct World {
    pub(crate) projects: BTreeMap<ProjectId, Project>,
    pub(crate) hosts: BTreeMap<HostId, Box<Host>>,
    pub(crate) pools: BTreeMap<PoolId, Pool>,
    pub(crate) volumes: BTreeMap<VolumeId, Volume>,
    pub(crate) networks: BTreeMap<NetworkId, Network>,
    pub(crate) subnets: BTreeMap<SubnetId, Subnet>,
    pub(crate) ports: BTreeMap<PortId, Port>,
    pub(crate) templates: BTreeMap<TemplateId, Box<Template>>,
    pub(crate) vms: BTreeMap<VmId, Box<Vm>>,
    pub(crate) operations: BTreeMap<OperationId, Box<Operation>>,
    pub(crate) join_tokens: BTreeMap<TokenId, JoinToken>,
    pub(crate) api_tokens: BTreeMap<TokenId, ApiToken>,
    pub(crate) outbox: BTreeMap<(HostId, Subject), Box<OutboxRow>>,
    pub(crate) answers: BTreeMap<(ProjectId, String), Answer>,
    pub(crate) notices: BTreeMap<Sequence, Box<Notice>>,
    pub(crate) users: BTreeMap<UserId, Box<User>>,
    pub(crate) seeds: BTreeMap<VmId, Box<SeedRow>>,
    pub(crate) security_groups: BTreeMap<SecurityGroupId, Box<SecurityGroup>>,
    pub(crate) index: Index,
    pub(crate) transient: Transient,
}

/// What is not stored: it is told anew, or may be lost.
#[derive(Clone, Debug, Default)]
pub(crate) struct Transient {
    /// The leader's epoch, written into every order.
    pub(crate) epoch: Epoch,
    /// How far running operations are.
    pub(crate) progress: BTreeMap<OperationId, Progress>,
    /// VMs that reconciliation looks at first.
    pub(crate) dirty: std::collections::BTreeSet<VmId>,
    /// Hosts whose agents have a session, as far as this process knows: what is stored may be of an earlier one.
    pub(crate) connected: std::collections::BTreeSet<HostId>,
    /// Where reconciliation goes on walking.
    pub(crate) cursor: Option<VmId>,
    /// When each host was last complained about: a flood of bad reports must not push out other notices.
    pub(crate) complained: BTreeMap<HostId, Timestamp>,
    /// Of which VMs a host refused to clear away what it has: how often in a row, and when it is asked again.
    pub(crate) refusals: BTreeMap<VmId, (u32, Timestamp)>,
}

/// Rows that are no world.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LoadError {
    /// Two rows have one key.
    #[error("the store holds two rows with the key {0:?}; restore it from a backup")]
    Duplicate(Box<Key>),
    /// A row refers to one that is not there.
    #[error("the store's row {row:?} refers to {missing}, which is not there; restore it from a backup")]
    Dangling {
        /// The row.
        row: Box<Key>,
        /// What it refers to.
        missing: String,
    },
}

impl PartialEq for World {
    /// Equal rows. What is not stored does not count.
    fn eq(&self, other: &Self) -> bool {
        self.projects == other.projects
            && self.hosts == other.hosts
            && self.pools == other.pools
            && self.volumes == other.volumes
            && self.networks == other.networks
            && self.subnets == other.subnets
            && self.ports == other.ports
            && self.templates == other.templates
            && self.vms == other.vms
            && self.operations == other.operations
            && self.join_tokens == other.join_tokens
            && self.api_tokens == other.api_tokens
            && self.outbox == other.outbox
            && self.answers == other.answers
            && self.notices == other.notices
            && self.users == other.users
            && self.seeds == other.seeds
            && self.security_groups == other.security_groups
    }
}

impl World {
    /// The world that these rows are.
    ///
    /// # Errors
    /// When two rows have one key, or a row refers to one that is missing.
    pub fn load(mut rows: Vec<Row>) -> Result<Self, LoadError> {
        // By kind, in the order in which rows refer to each other: a subnet before its ports.
        rows.sort_by_cached_key(Row::key);
        rows.sort_by_key(|row| matches!(row, Row::Port(_)));
        let mut world = Self::default();
        for row in rows {
            let key = row.key();
            if world.has(&key) {
                return Err(LoadError::Duplicate(Box::new(key)));
            }
            world.insert(row);
        }
        world.check_references()?;
        world.count_disks();
        world.transient.dirty = world.vms.keys().copied().collect();
        Ok(world)
    }

    /// Counts what projects' disks hold: rows of before that was counted do not say it.
    fn count_disks(&mut self) {
        for project in self.projects.values_mut() {
            project.used.disk_bytes = 0;
        }
        for volume in self.volumes.values() {
            if let Some(project) = self.projects.get_mut(&volume.project) {
                let used = &mut project.used.disk_bytes;
                *used = used.saturating_add(volume.size_bytes);
            }
        }
    }

    /// Every reference that the engine follows without looking.
    fn check_references(&self) -> Result<(), LoadError> {
        let need = |there: bool, row: Key, missing: String| {
            if there {
                return Ok(());
            }
            let row = Box::new(row);
            Err(LoadError::Dangling { row, missing })
        };
        for vm in self.vms.values() {
            let project = self.projects.contains_key(&vm.project);
            need(project, Key::Vm(vm.id), format!("project {}", vm.project))?;
            let template = self.templates.contains_key(&vm.spec.template);
            need(template, Key::Vm(vm.id), format!("template {}", vm.spec.template))?;
            for id in &vm.volumes {
                need(self.volumes.contains_key(id), Key::Vm(vm.id), format!("volume {id}"))?;
            }
            for id in &vm.ports {
                need(self.ports.contains_key(id), Key::Vm(vm.id), format!("port {id}"))?;
            }
            if let Some(id) = vm.operation {
                need(
                    self.operations.contains_key(&id),
                    Key::Vm(vm.id),
                    format!("operation {id}"),
                )?;
            }
        }
        for id in self.seeds.keys() {
            need(self.vms.contains_key(id), Key::Seed(*id), format!("VM {id}"))?;
        }
        for port in self.ports.values() {
            let subnet = self.subnets.contains_key(&port.subnet);
            need(subnet, Key::Port(port.id), format!("subnet {}", port.subnet))?;
            for id in &port.spec.groups {
                let group = self.security_groups.contains_key(id);
                need(group, Key::Port(port.id), format!("security group {id}"))?;
            }
        }
        for subnet in self.subnets.values() {
            let network = self.networks.contains_key(&subnet.network);
            need(network, Key::Subnet(subnet.id), format!("network {}", subnet.network))?;
        }
        Ok(())
    }

    /// Takes a stored change over. The engine's own changes are already taken over; this is for a copy that follows.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Put(row) => self.insert(row),
            Change::Delete(key) => drop(self.remove(&key)),
        }
    }

    /// The hosts whose agents have a session already when the world is loaded.
    pub fn set_connected(&mut self, hosts: impl IntoIterator<Item = HostId>) {
        self.transient.connected = hosts.into_iter().collect();
    }

    /// The leader's epoch, written into every order from now on, those that wait in the outbox included: agents refuse orders of
    /// a deposed leader. The store's copy of a waiting order keeps the epoch under which it was written.
    pub fn set_epoch(&mut self, epoch: Epoch) {
        self.transient.epoch = epoch;
        for row in self.outbox.values_mut() {
            match &mut row.order {
                Order::Vm(order) => order.epoch = epoch,
                Order::Template(order) => order.epoch = epoch,
                Order::Port(order) => order.epoch = epoch,
                Order::Lend(order) => order.epoch = epoch,
                Order::Relay(_) => {}
            }
        }
    }

    /// The orders that a host has not answered: sent again whenever it connects.
    pub fn outbox(&self, host: HostId) -> impl Iterator<Item = Order> {
        let first = (host, Subject::Vm(VmId(uuid_min())));
        self.outbox
            .range(first..)
            .take_while(move |((of, _), _)| *of == host)
            .map(|(_, row)| self.seeded(row.order.clone()))
    }

    /// An order as its host gets it: one that starts a VM brings what its guest is told, which the outbox does not keep.
    pub(crate) fn seeded(&self, mut order: Order) -> Order {
        if let Order::Vm(order) = &mut order
            && let Verb::Start { seed, .. } = &mut order.verb
        {
            *seed = self.seeds.get(&order.vm).map(|row| Box::new(row.seed.clone()));
        }
        order
    }

    /// An API token, with the hash of its secret to compare.
    #[must_use]
    pub fn authenticate(&self, id: TokenId) -> Option<&ApiToken> {
        self.api_tokens.get(&id)
    }

    /// A join token, with the hash of its secret to compare.
    #[must_use]
    pub fn join_token(&self, id: TokenId) -> Option<&JoinToken> {
        self.join_tokens.get(&id)
    }

    /// When the engine wants a [`model::Event::Tick`] at the latest; `None` when nothing is due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Timestamp> {
        self.index.next_deadline()
    }

    /// Whether reconciliation has more to look at now: tick again as soon as there is nothing else to do.
    #[must_use]
    pub fn has_work(&self) -> bool {
        !self.transient.dirty.is_empty()
    }

    /// The notices after a position, oldest first. At most 10,000 are kept.
    pub fn notices(&self, after: Sequence) -> impl Iterator<Item = &Notice> {
        self.notices.range(after.next()..).map(|(_, notice)| &**notice)
    }

    /// Position of the newest notice; 0 when there is none.
    #[must_use]
    pub fn last_sequence(&self) -> Sequence {
        self.notices.last_key_value().map_or(Sequence(0), |(&at, _)| at)
    }

    /// Position of the oldest notice that is kept; 0 when there is none.
    #[must_use]
    pub fn first_sequence(&self) -> Sequence {
        self.notices.first_key_value().map_or(Sequence(0), |(&at, _)| at)
    }

    /// A project by its name.
    #[must_use]
    pub fn project_by_name(&self, name: &Name) -> Option<&Project> {
        self.index.project_names.get(name).and_then(|id| self.projects.get(id))
    }

    /// A project.
    #[must_use]
    pub fn project(&self, id: ProjectId) -> Option<&Project> {
        self.projects.get(&id)
    }

    /// A user.
    #[must_use]
    pub fn user(&self, id: UserId) -> Option<&User> {
        self.users.get(&id).map(|user| &**user)
    }

    /// A host.
    #[must_use]
    pub fn host(&self, id: HostId) -> Option<&Host> {
        self.hosts.get(&id).map(|host| &**host)
    }

    /// All hosts.
    pub fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.hosts.values().map(|host| &**host)
    }

    /// A VM.
    #[must_use]
    pub fn vm(&self, id: VmId) -> Option<&Vm> {
        self.vms.get(&id).map(|vm| &**vm)
    }

    /// All VMs.
    pub fn vms(&self) -> impl Iterator<Item = &Vm> {
        self.vms.values().map(|vm| &**vm)
    }

    /// A template.
    #[must_use]
    pub fn template(&self, id: TemplateId) -> Option<&Template> {
        self.templates.get(&id).map(|template| &**template)
    }

    /// An operation.
    #[must_use]
    pub fn operation(&self, id: OperationId) -> Option<&Operation> {
        self.operations.get(&id).map(|operation| &**operation)
    }

    /// All operations that are kept.
    pub fn operations(&self) -> impl Iterator<Item = &Operation> {
        self.operations.values().map(|operation| &**operation)
    }

    /// All ports, those of resting addresses included.
    pub fn ports(&self) -> impl Iterator<Item = &Port> {
        self.ports.values()
    }

    /// All projects.
    pub fn projects(&self) -> impl Iterator<Item = &Project> {
        self.projects.values()
    }

    /// What VMs hold on a host now, moves under way counted on both ends.
    #[must_use]
    pub fn held(&self, host: HostId) -> Held {
        self.index.held.get(&host).copied().unwrap_or_default()
    }

    /// Every row, by key.
    #[must_use]
    pub fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        rows.extend(self.projects.values().cloned().map(Row::Project));
        rows.extend(self.hosts.values().cloned().map(Row::Host));
        rows.extend(self.pools.values().cloned().map(Row::Pool));
        rows.extend(self.volumes.values().cloned().map(Row::Volume));
        rows.extend(self.networks.values().cloned().map(Row::Network));
        rows.extend(self.subnets.values().cloned().map(Row::Subnet));
        rows.extend(self.ports.values().cloned().map(Row::Port));
        rows.extend(self.templates.values().cloned().map(Row::Template));
        rows.extend(self.vms.values().cloned().map(Row::Vm));
        rows.extend(self.operations.values().cloned().map(Row::Operation));
        rows.extend(self.join_tokens.values().cloned().map(Row::JoinToken));
        rows.extend(self.api_tokens.values().cloned().map(Row::ApiToken));
        rows.extend(self.outbox.values().cloned().map(Row::Outbox));
        rows.extend(self.answers.values().cloned().map(Row::Answer));
        rows.extend(self.notices.values().cloned().map(Row::Notice));
        rows.extend(self.users.values().cloned().map(Row::User));
        rows.extend(self.seeds.values().cloned().map(Row::Seed));
        rows.extend(self.security_groups.values().cloned().map(Row::SecurityGroup));
        rows
    }

    /// Whether there is such a row.
    fn has(&self, key: &Key) -> bool {
        match key {
            Key::Project(id) => self.projects.contains_key(id),
            Key::Host(id) => self.hosts.contains_key(id),
            Key::Pool(id) => self.pools.contains_key(id),
            Key::Volume(id) => self.volumes.contains_key(id),
            Key::Network(id) => self.networks.contains_key(id),
            Key::Subnet(id) => self.subnets.contains_key(id),
            Key::Port(id) => self.ports.contains_key(id),
            Key::Template(id) => self.templates.contains_key(id),
            Key::Vm(id) => self.vms.contains_key(id),
            Key::Operation(id) => self.operations.contains_key(id),
            Key::JoinToken(id) => self.join_tokens.contains_key(id),
            Key::ApiToken(id) => self.api_tokens.contains_key(id),
            Key::Outbox(host, subject) => self.outbox.contains_key(&(*host, *subject)),
            Key::Answer(project, key) => self.answers.contains_key(&(*project, key.clone())),
            Key::Notice(sequence) => self.notices.contains_key(sequence),
            Key::User(id) => self.users.contains_key(id),
            Key::Seed(vm) => self.seeds.contains_key(vm),
            Key::SecurityGroup(id) => self.security_groups.contains_key(id),
            Key::Audit(_) => false,
        }
    }

    /// Whether exactly this row is there.
    pub(crate) fn holds(&self, row: &Row) -> bool {
        match row {
            Row::Project(row) => self.projects.get(&row.id) == Some(row),
            Row::Host(row) => self.hosts.get(&row.id) == Some(row),
            Row::Pool(row) => self.pools.get(&row.id) == Some(row),
            Row::Volume(row) => self.volumes.get(&row.id) == Some(row),
            Row::Network(row) => self.networks.get(&row.id) == Some(row),
            Row::Subnet(row) => self.subnets.get(&row.id) == Some(row),
            Row::Port(row) => self.ports.get(&row.id) == Some(row),
            Row::Template(row) => self.templates.get(&row.id) == Some(row),
            Row::Vm(row) => self.vms.get(&row.id) == Some(row),
            Row::Operation(row) => self.operations.get(&row.id) == Some(row),
            Row::JoinToken(row) => self.join_tokens.get(&row.id) == Some(row),
            Row::ApiToken(row) => self.api_tokens.get(&row.id) == Some(row),
            Row::Outbox(row) => self.outbox.get(&(row.host, row.order.subject())) == Some(row),
            Row::Answer(row) => self.answers.get(&(row.project, row.key.clone())) == Some(row),
            Row::Notice(row) => self.notices.get(&row.sequence) == Some(row),
            Row::User(row) => self.users.get(&row.id) == Some(row),
            Row::Seed(row) => self.seeds.get(&row.vm) == Some(row),
            Row::SecurityGroup(row) => self.security_groups.get(&row.id) == Some(row),
            Row::Audit(_) => false,
        }
    }

    /// Puts a row in, over one with its key.
    pub(crate) fn insert(&mut self, row: Row) {
        self.remove(&row.key());
        self.index.touch(&row, true);
        match row {
            Row::Project(row) => drop(self.projects.insert(row.id, row)),
            Row::Host(row) => drop(self.hosts.insert(row.id, row)),
            Row::Pool(row) => drop(self.pools.insert(row.id, row)),
            Row::Volume(row) => drop(self.volumes.insert(row.id, row)),
            Row::Network(row) => drop(self.networks.insert(row.id, row)),
            Row::Subnet(row) => drop(self.subnets.insert(row.id, row)),
            Row::Port(row) => drop(self.ports.insert(row.id, row)),
            Row::Template(row) => drop(self.templates.insert(row.id, row)),
            Row::Vm(row) => drop(self.vms.insert(row.id, row)),
            Row::Operation(row) => drop(self.operations.insert(row.id, row)),
            Row::JoinToken(row) => drop(self.join_tokens.insert(row.id, row)),
            Row::ApiToken(row) => drop(self.api_tokens.insert(row.id, row)),
            Row::Outbox(row) => drop(self.outbox.insert((row.host, row.order.subject()), row)),
            Row::Answer(row) => drop(self.answers.insert((row.project, row.key.clone()), row)),
            Row::Notice(row) => drop(self.notices.insert(row.sequence, row)),
            Row::User(row) => drop(self.users.insert(row.id, row)),
            Row::Seed(row) => drop(self.seeds.insert(row.vm, row)),
            Row::SecurityGroup(row) => drop(self.security_groups.insert(row.id, row)),
            // Written once and read from the store alone.
            Row::Audit(_) => {}
        }
    }

    /// Takes a row out.
    pub(crate) fn remove(&mut self, key: &Key) -> Option<Row> {
        let row = match key {
            Key::Project(id) => self.projects.remove(id).map(Row::Project),
            Key::Host(id) => self.hosts.remove(id).map(Row::Host),
            Key::Pool(id) => self.pools.remove(id).map(Row::Pool),
            Key::Volume(id) => self.volumes.remove(id).map(Row::Volume),
            Key::Network(id) => self.networks.remove(id).map(Row::Network),
            Key::Subnet(id) => self.subnets.remove(id).map(Row::Subnet),
            Key::Port(id) => self.ports.remove(id).map(Row::Port),
            Key::Template(id) => self.templates.remove(id).map(Row::Template),
            Key::Vm(id) => self.vms.remove(id).map(Row::Vm),
            Key::Operation(id) => self.operations.remove(id).map(Row::Operation),
            Key::JoinToken(id) => self.join_tokens.remove(id).map(Row::JoinToken),
            Key::ApiToken(id) => self.api_tokens.remove(id).map(Row::ApiToken),
            Key::Outbox(host, subject) => self.outbox.remove(&(*host, *subject)).map(Row::Outbox),
            Key::Answer(project, key) => self.answers.remove(&(*project, key.clone())).map(Row::Answer),
            Key::Notice(sequence) => self.notices.remove(sequence).map(Row::Notice),
            Key::User(id) => self.users.remove(id).map(Row::User),
            Key::Seed(vm) => self.seeds.remove(vm).map(Row::Seed),
            Key::SecurityGroup(id) => self.security_groups.remove(id).map(Row::SecurityGroup),
            Key::Audit(_) => None,
        }?;
        self.index.touch(&row, false);
        Some(row)
    }
}

/// The least UUID.
pub(crate) fn uuid_min() -> uuid::Uuid {
    uuid::Uuid::nil()
}
