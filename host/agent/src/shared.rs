//! What all tasks of an agent share: configuration, identity, journal, connections, and the VMs' runners.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use identity::NodeIdentity;
use model::{
    BootId, Epoch, HostId, Name, Order, PoolId, Report, Telemetry, VmId,
    operation::Progress,
    order::{PortOrder, PortReport, Relay, VmObserved},
};
use network::{InterfaceName, Network};
use task::{Input, Peer, Saved, Task};
use tokio::sync::{Notify, SetOnce, broadcast, mpsc};
use wire::{
    Up,
    session::{FRAME_BYTES_MAX, PORTS_MAX},
};

use crate::{
    AgentConfig, Membership,
    blobs::Blobs,
    console::Serial,
    desks,
    journal::{self, Journal, JournalError},
    peers::Peers,
    policies::Policies,
    reports::Reports,
    room::{Room, RoomError},
    runner::{self, Fed},
    seeds,
    session::Link,
    telemetry::Watched,
    template, tunnel,
};

/// Inputs waiting for one VM. A VM that does not take them is stuck; orders and words come again.
const INPUTS_MAX: usize = 256;

/// Between two words on what went through the ports.
const TRAFFIC_EVERY: Duration = Duration::from_secs(5);

/// A storage pool of this host.
pub(crate) struct NamedPool {
    /// As this host's configuration calls it.
    pub(crate) name: Name,
    pub(crate) pool: image::Pool,
    pub(crate) room: Arc<Room>,
}

/// How long a pool's file system may take for a small thing.
const POOL_ANSWERS_MAX: Duration = Duration::from_secs(30);

impl NamedPool {
    /// Does a small thing in the pool, off the runtime's own threads and in bounded time.
    pub(crate) async fn run<T, F>(self: &Arc<Self>, work: F) -> Result<T, RoomError>
    where
        T: Send + 'static,
        F: FnOnce(&image::Pool) -> T + Send + 'static,
    {
        let pool = Arc::clone(self);
        self.room.run(move || work(&pool.pool), POOL_ANSWERS_MAX).await
    }
}

/// What all tasks of an agent share.
pub(crate) struct Shared {
    pub(crate) config: AgentConfig,
    pub(crate) membership: Membership,
    pub(crate) boot: BootId,
    pub(crate) peer_port: u16,
    /// Known a while after hand-overs were taken up.
    qemu: SetOnce<qemu::Qemu>,
    /// What tunnels are started from.
    pub(crate) tunnels: tunnel::Program,
    /// What all desks share.
    pub(crate) desks: desks::Common,
    pub(crate) network: Arc<Network>,
    /// What ports let through.
    pub(crate) policies: Arc<Policies>,
    pub(crate) bridge: InterfaceName,
    pub(crate) pools: BTreeMap<PoolId, Arc<NamedPool>>,
    pub(crate) reports: Reports,
    pub(crate) peers: Arc<Peers>,
    pub(crate) templates: template::Running,
    pub(crate) imports: template::Turns,
    pub(crate) blobs: Blobs,
    identity: Mutex<Arc<NodeIdentity>>,
    journal: Mutex<Journal>,
    unsynced: Notify,
    vms: Mutex<BTreeMap<VmId, Vm>>,
    link: Mutex<Option<Link>>,
    progress: Mutex<Option<mpsc::Sender<Bytes>>>,
    epoch: AtomicU64,
}

/// A VM's runner, as others see it.
struct Vm {
    inputs: mpsc::Sender<Fed>,
    shown: Arc<Shown>,
}

/// What a runner shows to others.
pub(crate) struct Shown {
    pub(crate) observed: Mutex<VmObserved>,
    pub(crate) serial: Mutex<Option<Serial>>,
    /// Its process, while there is one.
    pub(crate) watched: Mutex<Option<Watched>>,
}

/// The parts of [`Shared`] that starting an agent finds out.
pub(crate) struct Parts {
    pub(crate) config: AgentConfig,
    pub(crate) membership: Membership,
    pub(crate) boot: BootId,
    pub(crate) peer_port: u16,
    pub(crate) network: Network,
    pub(crate) desks: desks::Common,
    pub(crate) policies: Policies,
    pub(crate) pools: BTreeMap<PoolId, Arc<NamedPool>>,
    pub(crate) identity: NodeIdentity,
    pub(crate) journal: Journal,
    pub(crate) tunnels: tunnel::Program,
}

/// A lock whose holder panicked still guards whole values: each is replaced in one step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn new(parts: Parts) -> Arc<Self> {
        let epoch = parts.journal.saved().map(|saved| saved.epoch.0).max().unwrap_or(0);
        Arc::new(Self {
            bridge: parts.config.bridge.clone(),
            config: parts.config,
            membership: parts.membership,
            boot: parts.boot,
            peer_port: parts.peer_port,
            qemu: SetOnce::new(),
            tunnels: parts.tunnels,
            desks: parts.desks,
            network: Arc::new(parts.network),
            policies: Arc::new(parts.policies),
            pools: parts.pools,
            reports: Reports::default(),
            peers: Arc::default(),
            templates: template::Running::default(),
            imports: template::Turns::default(),
            blobs: Blobs::default(),
            identity: Mutex::new(Arc::new(parts.identity)),
            journal: Mutex::new(parts.journal),
            unsynced: Notify::new(),
            vms: Mutex::default(),
            link: Mutex::default(),
            progress: Mutex::default(),
            epoch: AtomicU64::new(epoch),
        })
    }

    pub(crate) fn host(&self) -> HostId {
        self.membership.host
    }

    /// From now on VMs can start.
    pub(crate) fn has_hypervisor(&self, qemu: qemu::Qemu) {
        // Found once in an agent's life.
        let _ = self.qemu.set(qemu);
    }

    /// This host's QEMU, as soon as it is known.
    pub(crate) async fn qemu(&self) -> &qemu::Qemu {
        self.qemu.wait().await
    }

    pub(crate) fn identity(&self) -> Arc<NodeIdentity> {
        Arc::clone(&lock(&self.identity))
    }

    pub(crate) fn set_identity(&self, identity: NodeIdentity) {
        *lock(&self.identity) = Arc::new(identity);
    }

    pub(crate) fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Relaxed))
    }

    pub(crate) fn link(&self) -> Option<Link> {
        lock(&self.link).clone()
    }

    pub(crate) fn set_link(&self, link: Option<Link>) {
        if link.is_none() {
            self.set_progress(None);
        }
        *lock(&self.link) = link;
    }

    pub(crate) fn set_progress(&self, up: Option<mpsc::Sender<Bytes>>) {
        *lock(&self.progress) = up;
    }

    /// Tells how far an operation is, if there is a session with room for it.
    pub(crate) fn progress(&self, operation: model::OperationId, progress: Progress) {
        if let Some(up) = lock(&self.progress).as_ref()
            && let Ok(frame) = wire::encode(&Up::Progress { operation, progress }, FRAME_BYTES_MAX)
        {
            // Telemetry: a full channel drops it.
            let _ = up.try_send(frame);
        }
    }

    /// Whether somebody hears what is told.
    pub(crate) fn is_connected(&self) -> bool {
        lock(&self.progress).is_some()
    }

    /// Tells what this host and its VMs use, if there is a session with room for it.
    pub(crate) fn tell(&self, telemetry: Telemetry) {
        let telemetry = Box::new(telemetry);
        match wire::encode(&Up::Telemetry { telemetry }, FRAME_BYTES_MAX) {
            Ok(frame) => {
                let up = lock(&self.progress);
                // A full channel drops it.
                let _ = up.as_ref().map(|up| up.try_send(frame));
            }
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "this host's figures cannot be told"
            ),
        }
    }

    /// VMs with a process here.
    pub(crate) fn watched(&self) -> BTreeMap<VmId, Watched> {
        let vms = lock(&self.vms);
        let watched = vms.iter().filter_map(|(vm, runner)| {
            let watched = lock(&runner.shown.watched).clone()?;
            Some((*vm, watched))
        });
        watched.collect()
    }

    /// Tells now and then what went through the ports, as long as the agent lives.
    pub(crate) async fn tell_traffic(self: Arc<Self>) {
        let mut every = tokio::time::interval(TRAFFIC_EVERY);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            every.tick().await;
            let Some(up) = lock(&self.progress).clone() else {
                continue;
            };
            let shared = Arc::clone(&self);
            let told = tokio::task::spawn_blocking(move || shared.policies.traffic(&shared.network)).await;
            match told {
                Ok(Ok(ports)) => {
                    for ports in ports.chunks(PORTS_MAX) {
                        if let Ok(frame) = wire::encode(&Up::Ports { ports: ports.to_vec() }, FRAME_BYTES_MAX) {
                            // Telemetry: a full channel drops it.
                            let _ = up.try_send(frame);
                        }
                    }
                }
                Ok(Err(why)) => tracing::warn!(why, "what went through the ports cannot be read"),
                // The agent ends.
                Err(_) => return,
            }
        }
    }

    /// Writes a VM's state to the journal; it is in the kernel on return, and on the disk soon.
    pub(crate) fn save(&self, saved: &Saved) -> Result<(), JournalError> {
        lock(&self.journal).append(saved)?;
        self.unsynced.notify_one();
        Ok(())
    }

    /// Brings the journal to the disk whenever something was written.
    pub(crate) async fn sync_journal(self: Arc<Self>) {
        loop {
            self.unsynced.notified().await;
            let handle = lock(&self.journal).sync_handle();
            let synced = tokio::task::spawn_blocking(move || match handle {
                Ok(file) => file.sync_data(),
                Err(error) => Err(std::io::Error::other(error)),
            });
            if let Ok(Err(error)) = synced.await {
                tracing::error!(%error, "the journal is not on the disk; a loss of power now would make VMs unknown");
            }
            let shared = Arc::clone(&self);
            let compacted = tokio::task::spawn_blocking(move || journal::compact(&shared.journal));
            if let Ok(Err(error)) = compacted.await {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the journal grows: it was not written anew; tried again later"
                );
            }
        }
    }

    /// What the journal has of a VM.
    pub(crate) fn saved_of(&self, vm: VmId) -> Option<Saved> {
        lock(&self.journal).saved_of(vm).cloned()
    }

    /// Carries out an order.
    pub(crate) fn order(shared: &Arc<Self>, order: Order) {
        match order {
            Order::Vm(mut order) => {
                seeds::take(shared, &mut order);
                shared.epoch.fetch_max(order.epoch.0, Ordering::Relaxed);
                shared.feed(order.vm, Input::Order(order), true);
            }
            Order::Template(order) => {
                let shared = Arc::clone(shared);
                tokio::spawn(async move { template::carry_out(&shared, order).await });
            }
            Order::Port(order) => shared.order_port(order),
            Order::Relay(word) if word.to == shared.host() => shared.hear(word),
            Order::Relay(_) => {}
            Order::Lend(order) if order.epoch >= shared.epoch() => shared.blobs.lend(&order),
            Order::Lend(_) => {}
        }
    }

    /// Sets what a port lets through, aside, and tells when it is in force.
    fn order_port(self: &Arc<Self>, order: Box<PortOrder>) {
        if order.epoch < self.epoch() {
            return;
        }
        self.epoch.fetch_max(order.epoch.0, Ordering::Relaxed);
        let shared = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            let refused = shared.policies.order(&shared.network, &order.port).err();
            shared.reports.push(Report::Port(PortReport {
                port: order.port.port,
                revision: order.port.policy.revision,
                refused,
            }));
        });
    }

    /// Hears a word of another agent; the caller has checked who says it.
    pub(crate) fn hear(self: &Arc<Self>, word: Relay) {
        let peer = Peer {
            host: word.from,
            granted: word.granted,
            message: word.message,
        };
        let known = lock(&self.vms).contains_key(&word.vm) || lock(&self.journal).saved_of(word.vm).is_some();
        // Of a VM of which nothing is known here nothing can be said.
        if known {
            self.feed(word.vm, Input::Peer(peer), false);
        }
    }

    /// Gives a VM's runner something; begins the runner where there is none.
    fn feed(self: &Arc<Self>, vm: VmId, input: Input, fresh: bool) {
        let mut vms = lock(&self.vms);
        let Some(runner) = self.runner_of(&mut vms, vm, fresh) else {
            return;
        };
        if runner.inputs.try_send(Fed::Input(input)).is_err() {
            tracing::warn!(%vm, "the VM takes no more inputs; this one will come again");
        }
    }

    /// Begins a VM's runner anew from what is written down, if it broke off.
    pub(crate) fn begin_anew(self: &Arc<Self>, vm: VmId) {
        let mut vms = lock(&self.vms);
        if vms.contains_key(&vm) {
            self.runner_of(&mut vms, vm, false);
        }
    }

    /// A VM's runner, begun where there is none, or none that lives. `None` for a VM of which nothing is known, unless it is `fresh`.
    fn runner_of<'v>(self: &Arc<Self>, vms: &'v mut BTreeMap<VmId, Vm>, vm: VmId, fresh: bool) -> Option<&'v mut Vm> {
        // One that is through is taken out under the lock before it ends.
        if vms.get(&vm).is_some_and(|runner| runner.inputs.is_closed()) {
            tracing::error!(%vm, "the VM's runner broke off; it is begun anew");
            vms.remove(&vm);
        }
        match vms.entry(vm) {
            btree_map::Entry::Occupied(entry) => Some(entry.into_mut()),
            btree_map::Entry::Vacant(entry) => {
                let saved = lock(&self.journal).saved_of(vm).cloned();
                let (task, effects) = match saved {
                    Some(saved) => Task::recover(saved, self.host(), self.boot),
                    None if fresh => (Task::new(vm, self.host(), self.boot), vec![]),
                    None => return None,
                };
                Some(entry.insert(self.begin(task, effects)))
            }
        }
    }

    fn begin(self: &Arc<Self>, task: Task, effects: Vec<task::Effect>) -> Vm {
        let (inputs, queue) = mpsc::channel(INPUTS_MAX);
        let shown = Arc::new(Shown {
            observed: Mutex::new(task.observed()),
            serial: Mutex::new(None),
            watched: Mutex::new(None),
        });
        runner::start(
            Arc::clone(self),
            task,
            effects,
            queue,
            inputs.clone(),
            Arc::clone(&shown),
        );
        Vm { inputs, shown }
    }

    /// Takes up all VMs of the journal, hand-overs first: they have waited for a decision.
    pub(crate) fn take_up(self: &Arc<Self>) {
        let mut saved: Vec<Saved> = lock(&self.journal).saved().cloned().collect();
        let gone = |saved: &Saved| saved.role == task::Role::None && saved.pending.is_none();
        let here: BTreeSet<VmId> = saved
            .iter()
            .filter(|saved| !gone(saved))
            .map(|saved| saved.vm)
            .collect();
        self.sweep_logs(&here);
        self.renew_policies(saved.iter().filter(|saved| !gone(saved)));
        seeds::sweep(&self.config.seeds_dir(), &here);
        saved.sort_by_key(|saved| matches!(saved.role, task::Role::Holder | task::Role::None));
        for saved in saved {
            // Of an older boot nothing is left to clear away.
            if gone(&saved) && saved.boot != self.boot {
                continue;
            }
            let vm = saved.vm;
            let (task, effects) = Task::recover(saved, self.host(), self.boot);
            let runner = self.begin(task, effects);
            lock(&self.vms).insert(vm, runner);
        }
    }

    /// Sets what the ports of VMs that are here let through, as it was; nothing is left of others'.
    fn renew_policies<'s>(self: &Arc<Self>, saved: impl Iterator<Item = &'s Saved>) {
        let definitions = saved.filter_map(|saved| saved.definition.as_ref());
        let uses: Vec<_> = definitions.flat_map(|definition| definition.ports.clone()).collect();
        let here = uses.iter().map(|port| port.port).collect();
        let (shared, left) = (Arc::clone(self), self.policies.left(&here));
        tokio::task::spawn_blocking(move || {
            shared.policies.sweep(&shared.network, &left, &here);
            uses.iter()
                .for_each(|port| shared.policies.renew(&shared.network, port));
        });
    }

    /// Removes the logs of VMs that are not here any more: an agent that was killed may have left them.
    fn sweep_logs(&self, here: &BTreeSet<VmId>) {
        let logs = self.config.logs_dir();
        let found = std::fs::read_dir(&logs).into_iter().flatten().flatten();
        let left = found.filter(|entry| {
            let vm = entry.file_name().to_str().and_then(|name| name.parse().ok());
            vm.is_some_and(|vm: VmId| !here.contains(&vm))
        });
        for entry in left {
            if let Err(error) = runner::remove_logs(&entry.path()) {
                tracing::warn!(path = %entry.path().display(), %error, "logs of a VM that is gone were not removed");
            }
        }
    }

    /// Ends a runner whose VM is gone, unless something came for it meanwhile.
    pub(crate) fn forget(&self, vm: VmId, queue: &mut mpsc::Receiver<Fed>) -> Option<Fed> {
        let mut vms = lock(&self.vms);
        match queue.try_recv() {
            Ok(fed) => Some(fed),
            Err(_) => {
                vms.remove(&vm);
                None
            }
        }
    }

    /// All VMs that are known here, as their last reports would tell.
    pub(crate) fn inventory(&self) -> Vec<VmObserved> {
        let mut all: BTreeMap<VmId, VmObserved> = lock(&self.journal)
            .saved()
            .map(|saved| {
                (
                    saved.vm,
                    Task::recover(saved.clone(), self.host(), saved.boot).0.observed(),
                )
            })
            .collect();
        for (&vm, runner) in lock(&self.vms).iter() {
            all.insert(vm, lock(&runner.shown.observed).clone());
        }
        all.into_values().collect()
    }

    /// A VM's console: what it prints from now on, and where to type.
    pub(crate) async fn look_at(&self, vm: VmId) -> Option<(broadcast::Receiver<Bytes>, mpsc::Sender<Bytes>)> {
        let shown = lock(&self.vms).get(&vm).map(|vm| Arc::clone(&vm.shown))?;
        lock(&shown.serial).as_ref().map(Serial::look)
    }

    /// A pool of this host.
    pub(crate) fn pool(&self, id: PoolId) -> Option<Arc<NamedPool>> {
        self.pools.get(&id).cloned()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends where its promise is broken")]

    use model::{Generation, Revision};
    use uuid::Uuid;

    use super::*;
    use crate::fixture::Cell;

    #[tokio::test]
    async fn a_runner_that_broke_off_is_begun_anew_from_the_journal() {
        let shared = Cell::new().host(1).await;
        let vm = VmId(Uuid::from_u128(1));
        let mut saved = Saved::new(vm, shared.boot);
        (saved.role, saved.generation, saved.revision) = (task::Role::Holder, Generation(1), Revision(1));
        shared.save(&saved).unwrap();
        // As a panic leaves it.
        let broken = || {
            let (inputs, _) = mpsc::channel(1);
            let task = Task::recover(saved.clone(), shared.host(), shared.boot).0;
            let shown = Shown {
                observed: Mutex::new(task.observed()),
                serial: Mutex::default(),
                watched: Mutex::default(),
            };
            let shown = Arc::new(shown);
            lock(&shared.vms).insert(vm, Vm { inputs, shown });
        };
        let lives = || {
            lock(&shared.vms)
                .get(&vm)
                .is_some_and(|runner| !runner.inputs.is_closed())
        };
        broken();
        assert!(!lives());
        shared.begin_anew(vm);
        assert!(lives());
        broken();
        shared.feed(vm, Input::Lost, false);
        assert!(lives());
        let first = lock(&shared.vms)[&vm].inputs.clone();
        shared.begin_anew(vm);
        assert!(
            first.same_channel(&lock(&shared.vms)[&vm].inputs),
            "one that lives goes on"
        );
        shared.begin_anew(VmId(Uuid::from_u128(2)));
        assert_eq!(lock(&shared.vms).len(), 1);
    }
}
