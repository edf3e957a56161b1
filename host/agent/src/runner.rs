//! One VM's runner: feeds its task with what happens, and carries out what the task wants, strictly in order.
//!
//! ```text
//!   orders, words ─┐                                   ┌─▶ journal, reports, words
//!   hypervisor ────┼─▶ Fed ─▶ Task::step ─▶ effects ───┼─▶ hypervisor, tunnel, ports
//!   timers, work ──┘                                   └─▶ work in the background, fed back when it is done
//! ```

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    net::SocketAddr,
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use driver::{Action, Happened, Launch, Mode};
use image::{Base, VolumeRequest};
use model::{
    Code, Definition, Message, OperationId, PortId, Refusal, Report, VmId,
    order::{PortUse, Relay, VolumePlace},
    template::Boot,
};
use network::{Port, Tap};
use qemu::{Given, GivenKernel, GivenVolume, Pinned};
use task::{Effect, Input, Missed, Peer, Role, Task, Timer, Tunnel as TunnelWish, TunnelEvent};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::{
    blobs,
    console::Serial,
    desks::{self, Desks},
    journal,
    peers::PeerWatch,
    ports::{self, Found, Ports},
    portstate::To,
    seeds,
    shared::{NamedPool, Shared, Shown, lock},
    standstill::{Move, Standstill},
    telemetry::Watched,
    template::{chain, named},
    tunnel,
    tunnels::Tunnel,
};

/// Between two tries to find a process again that is there but does not answer.
const ADOPT_AGAIN: Duration = Duration::from_millis(500);
/// Between the end of a runner that broke off and the next one.
const BROKE_OFF_PAUSE: Duration = Duration::from_secs(1);
/// A word that was said this often without an answer is also said by way of the controller.
const DIRECT_WORDS: u32 = 2;
/// First of the user ids that VMs run as; each VM has its own, derived from its id.
const UID_FIRST: u32 = 0x2000_0000;
const UID_MASK: u32 = 0x0fff_ffff;

/// What a runner is fed.
pub(crate) enum Fed {
    /// An input of its task.
    Input(Input),
    /// A preparation is done.
    Prepared(Result<Prepared, Refusal>),
    /// Ports were looked for.
    Ports(Found),
    /// A process was started or found again, or neither.
    Started(Result<qemu::Vm, String>),
}

/// What the hypervisor needs to start, as it is on this host.
pub(crate) struct Prepared {
    launch: Box<Launch>,
    given: Given,
    ports: Vec<Port>,
}

/// The user id that a VM's process runs as.
pub(crate) fn uid_of(vm: VmId) -> u32 {
    let bytes = vm.0.as_bytes();
    let tail = u32::from_be_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
    UID_FIRST + (tail & UID_MASK)
}

/// Starts a VM's runner.
pub(crate) fn start(
    shared: Arc<Shared>,
    task: Task,
    effects: Vec<Effect>,
    queue: mpsc::Receiver<Fed>,
    back: mpsc::Sender<Fed>,
    shown: Arc<Shown>,
) {
    let vm = task.saved().vm;
    let runner = Runner {
        shared,
        vm,
        task,
        back,
        shown,
        machine: None,
        given: None,
        preparing: None,
        ports: Ports::default(),
        desks: Desks::default(),
        tunnel: None,
        peer: None,
        standstill: Standstill::default(),
        timers: BTreeMap::new(),
        said: (None, 0),
        end_deaf: Arc::default(),
        lost: false,
        gone: false,
    };
    let shared = Arc::clone(&runner.shared);
    let run = tokio::spawn(runner.run(effects, queue));
    tokio::spawn(async move {
        if run.await.is_err_and(|end| end.is_panic()) {
            // A defect; its VM runs on meanwhile. Not at once: one that breaks off again at its first step must not fill the log.
            tokio::time::sleep(BROKE_OFF_PAUSE).await;
            shared.begin_anew(vm);
        }
    });
}

struct Runner {
    shared: Arc<Shared>,
    vm: VmId,
    task: Task,
    back: mpsc::Sender<Fed>,
    shown: Arc<Shown>,
    machine: Option<qemu::Vm>,
    /// What a process that is about to start gets.
    given: Option<Given>,
    /// Dropped when what is being prepared is not wanted any more: nobody then waits for a template to be fetched.
    preparing: Option<oneshot::Sender<()>>,
    ports: Ports,
    desks: Desks,
    tunnel: Option<Tunnel>,
    /// Source: watches the connection to the destination's agent.
    peer: Option<PeerWatch>,
    standstill: Standstill,
    timers: BTreeMap<Timer, Instant>,
    /// The last word and how often it was said.
    said: (Option<Message>, u32),
    /// A process that is there but does not answer is to be ended: the task says so.
    end_deaf: Arc<AtomicBool>,
    /// The process was heard by this runner, and then no longer.
    lost: bool,
    gone: bool,
}

impl Runner {
    async fn run(mut self, effects: Vec<Effect>, mut queue: mpsc::Receiver<Fed>) {
        self.end_deaf.store(self.task.ends_deaf(), Ordering::Release);
        self.carry_out(effects).await;
        loop {
            let next = self
                .timers
                .iter()
                .min_by_key(|(_, at)| **at)
                .map(|(timer, at)| (*timer, *at));
            let input = tokio::select! {
                biased;
                // Without a word of its death it may live: a guest must not run on with nobody to hear it.
                event = next_of(&mut self.machine) => Fed::Input(event.map_or(Input::Lost, Input::Driver)),
                Some(fed) = queue.recv() => fed,
                () = until(self.ports.again_at()) => {
                    let missing = self.ports.missing();
                    self.look_for_ports(missing);
                    continue;
                }
                () = until(next.map(|(_, at)| at)) => match next {
                    Some((timer, _)) => {
                        self.timers.remove(&timer);
                        Fed::Input(Input::Timer(timer))
                    }
                    None => continue,
                },
            };
            self.take(input).await;
            while self.gone {
                self.remove_logs();
                seeds::forget(&self.shared.config.seeds_dir(), self.vm);
                // Under the same lock as feeding: nothing that comes now is lost.
                match self.shared.forget(self.vm, &mut queue) {
                    Some(fed) => self.take(fed).await,
                    None => return,
                }
            }
        }
    }

    async fn take(&mut self, fed: Fed) {
        let input = match fed {
            Fed::Input(input) => input,
            Fed::Prepared(Ok(prepared)) => {
                self.given = Some(prepared.given);
                self.ports.forget();
                self.desks.close();
                self.ports.know(prepared.ports);
                Input::Prepared(Ok(prepared.launch))
            }
            Fed::Ports(found) => {
                self.ports.found(&self.shared.network, self.vm, found);
                // One that waits for its guest opens them with its ports.
                if !matches!(self.task.saved().role, Role::Destination { .. }) {
                    self.open_desks();
                }
                return;
            }
            Fed::Prepared(Err(reason)) => {
                // The next order to start it brings it again.
                seeds::forget(&self.shared.config.seeds_dir(), self.vm);
                Input::Prepared(Err(reason))
            }
            // The first thing that it tells is how it is.
            Fed::Started(Ok(machine)) => return self.got(machine),
            Fed::Started(Err(reason)) => Input::Driver(Happened::NotUp { reason }),
        };
        match input {
            Input::Driver(Happened::Died { .. } | Happened::NotUp { .. }) => {
                self.machine = None;
                self.ports.close();
                *lock(&self.shown.serial) = None;
                *lock(&self.shown.watched) = None;
            }
            Input::Lost => {
                tracing::warn!(vm = %self.vm, "the VM's process is no longer heard; it is looked for again");
                self.machine = None;
                self.lost = true;
            }
            _ => {}
        }
        tracing::debug!(vm = %self.vm, ?input, "input");
        let effects = self.task.step(input);
        self.end_deaf.store(self.task.ends_deaf(), Ordering::Release);
        if self.task.is_given_up() {
            self.preparing = None;
        }
        self.carry_out(effects).await;
        self.gone = self.task.is_gone();
    }

    async fn carry_out(&mut self, effects: Vec<Effect>) {
        let mut effects = VecDeque::from(effects);
        while let Some(effect) = effects.pop_front() {
            tracing::debug!(vm = %self.vm, ?effect, "effect");
            self.effect(effect).await;
        }
        *lock(&self.shown.observed) = self.task.observed();
    }

    async fn effect(&mut self, effect: Effect) {
        match effect {
            // A barrier: what cannot be journalled must not be done, and no more is decided upon it. The process goes on by itself.
            Effect::Save(saved) => journal::insist(self.vm, || self.shared.save(&saved)).await,
            Effect::Prepare { definition, mode } => self.prepare(definition, mode),
            Effect::Spawn(launch) => self.spawn(launch),
            Effect::Adopt => self.adopt(),
            Effect::Act(action) => {
                if matches!(action, Action::Stand | Action::Copy(_)) {
                    self.standstill.asked();
                }
                if matches!(action, Action::Kill) {
                    self.ports.close();
                }
                self.act(action);
            }
            Effect::OpenPorts => self.open_ports(),
            Effect::Clear => self.clear(),
            Effect::DeleteFiles(volumes) => self.delete_files(volumes),
            Effect::Tunnel(wish) => self.tunnel(wish),
            Effect::Missed(wish) => self.missed(wish),
            Effect::Say(word) => self.say(word),
            Effect::Set(timer, after) => {
                self.timers.insert(timer, Instant::now() + Duration::from(after));
            }
            Effect::Stop(timer) => {
                self.timers.remove(&timer);
            }
            Effect::Report(report) => self.shared.reports.push(Report::Vm(report)),
            Effect::Progress(operation, progress) => self.shared.progress(operation, progress),
            // Seen after the whole step: the same step may have taken new work.
            Effect::Gone => {}
        }
    }

    /// What a guest printed here goes with it: its new host begins a log of its own.
    fn remove_logs(&self) {
        if let Err(error) = remove_logs(&self.shared.config.vm_log_dir(self.vm)) {
            tracing::warn!(vm = %self.vm, %error, "the VM's logs were not removed");
        }
    }

    fn prepare(&mut self, definition: Box<Definition>, mode: Mode) {
        let (shared, back) = (Arc::clone(&self.shared), self.back.clone());
        let operation = self.task.saved().operation;
        let (wanted, given_up) = oneshot::channel();
        self.preparing = Some(wanted);
        tokio::spawn(async move {
            let prepared = prepare(&shared, definition, mode, operation, given_up).await;
            // The runner outlives its work.
            let _ = back.send(Fed::Prepared(prepared)).await;
        });
    }

    fn spawn(&mut self, launch: Box<Launch>) {
        let given = self.given.take().unwrap_or_default();
        let (shared, back) = (Arc::clone(&self.shared), self.back.clone());
        tokio::spawn(async move {
            let started = shared
                .qemu()
                .await
                .spawn(*launch, given)
                .await
                .map_err(|error| chain(&error));
            let _ = back.send(Fed::Started(started)).await;
        });
    }

    fn adopt(&self) {
        let (shared, back, vm) = (Arc::clone(&self.shared), self.back.clone(), self.vm);
        let end_deaf = Arc::clone(&self.end_deaf);
        let lost = self.lost;
        tokio::spawn(async move {
            if lost {
                // One that is lost as soon as it is found must not keep the agent busy.
                tokio::time::sleep(ADOPT_AGAIN).await;
            }
            let found = adopt(&shared, vm, &end_deaf).await;
            let _ = back.send(Fed::Started(found)).await;
        });
    }

    fn got(&mut self, machine: qemu::Vm) {
        let handle = machine.handle();
        self.machine = Some(machine);
        if let Some(definition) = &self.task.saved().definition {
            let ports = definition.ports.iter().map(|port| port.port).collect();
            *lock(&self.shown.watched) = Some(Watched { handle, ports });
            // Of a process that was found again: now, so that it is not done when they are to be opened.
            let unknown = self.ports.unknown(&definition.ports);
            if !unknown.is_empty() {
                self.look_for_ports(unknown);
            }
        }
        let socket = self.shared.config.vm_run_dir(self.vm).join(driver::SERIAL_SOCKET);
        *lock(&self.shown.serial) = Some(Serial::open(socket, self.shared.config.vm_log_dir(self.vm)));
    }

    fn act(&self, action: Action) {
        let Some(machine) = &self.machine else {
            tracing::warn!(vm = %self.vm, ?action, "there is no process to ask");
            return;
        };
        if let Err(error) = machine.handle().act(action.clone()) {
            tracing::warn!(vm = %self.vm, ?action, %error, "the process was not asked");
            // A dead one has told so already.
            if !matches!(error, qemu::ActError::Dead) {
                let refused = Happened::Refused {
                    action: "asking QEMU",
                    reason: error.to_string(),
                };
                self.feed_back(Input::Driver(refused));
            }
        }
    }

    /// Something that the runner knows by itself.
    fn feed_back(&self, input: Input) {
        if self.back.try_send(Fed::Input(input)).is_err() {
            tracing::error!(vm = %self.vm, "the VM's inputs are not taken");
        }
    }

    fn open_ports(&mut self) {
        if let Some(definition) = &self.task.saved().definition {
            self.ports.open(&self.shared.network, self.vm, &definition.ports);
        }
        self.open_desks();
    }

    /// Lets the guest ask.
    fn open_desks(&mut self) {
        if let Some(definition) = &self.task.saved().definition {
            self.desks.open(&self.shared, definition, self.ports.all());
        }
    }

    /// Aside: the kernel may take its time to tell.
    fn look_for_ports(&self, ports: Vec<PortId>) {
        let (shared, back) = (Arc::clone(&self.shared), self.back.clone());
        tokio::task::spawn_blocking(move || {
            let found = ports::look_for(&shared.network, ports);
            // The runner outlives its work.
            let _ = back.blocking_send(Fed::Ports(found));
        });
    }

    /// Removes what is left of the VM here, but for its disks. The definition may be gone from the task by now, so taps vanish with
    /// their process, and those of a VM that never had one here.
    fn clear(&mut self) {
        self.given = None;
        self.ports.forget();
        self.desks.close();
        self.tunnel = None;
        self.peer = None;
        self.standstill.forget();
        *lock(&self.shown.serial) = None;
        *lock(&self.shown.watched) = None;
        self.machine = None;
        if let Some(definition) = &self.task.saved().definition {
            for port in &definition.ports {
                if let Err(error) = self.shared.network.remove(port.port) {
                    tracing::warn!(vm = %self.vm, error = &error as &dyn std::error::Error, "a tap was not removed");
                }
                self.shared.policies.forget(Arc::clone(&self.shared.network), port.port);
            }
        }
        if let Err(error) = qemu::clear(&self.shared.config.vm_run_dir(self.vm)) {
            tracing::warn!(vm = %self.vm, %error, "the VM's run directory was not removed");
        }
    }

    fn delete_files(&self, volumes: Vec<VolumePlace>) {
        let (shared, back) = (Arc::clone(&self.shared), self.back.clone());
        let (logs, vm) = (self.shared.config.vm_log_dir(self.vm), self.vm);
        tokio::task::spawn_blocking(move || {
            let result = delete_volumes(&shared, vm, &volumes);
            seeds::forget(&shared.config.seeds_dir(), vm);
            let _ = remove_logs(&logs);
            let _ = back.blocking_send(Fed::Input(Input::FilesDeleted(result)));
        });
    }

    fn tunnel(&mut self, wish: TunnelWish) {
        let config = &self.shared.config;
        let made = match wish {
            TunnelWish::Listen(terms) => Tunnel::listen(&self.shared.tunnels, config, &terms, self.back.clone()),
            TunnelWish::Dial(terms, to) => {
                let peer = SocketAddr::new(to.address, to.peer_port);
                self.peer = Some(PeerWatch::begin(
                    &self.shared,
                    terms.destination,
                    peer,
                    self.back.clone(),
                ));
                let tunnel = SocketAddr::new(to.address, to.tunnel_port);
                Tunnel::dial(&self.shared.tunnels, config, &terms, tunnel, self.back.clone())
            }
            TunnelWish::Adopt => match &self.task.saved().role {
                Role::Source { terms, to, .. } => {
                    let peer = SocketAddr::new(to.address, to.peer_port);
                    self.peer = Some(PeerWatch::begin(
                        &self.shared,
                        terms.destination,
                        peer,
                        self.back.clone(),
                    ));
                    Tunnel::adopt(config, terms, self.back.clone())
                }
                Role::Destination { terms, .. } => Tunnel::adopt(config, terms, self.back.clone()),
                Role::None | Role::Holder => return,
            },
            TunnelWish::Flow | TunnelWish::Hold | TunnelWish::Free => {
                if let Some(tunnel) = &mut self.tunnel {
                    tunnel.say(match wish {
                        TunnelWish::Flow => tunnel::Word::Flow,
                        TunnelWish::Hold => tunnel::Word::Hold,
                        _ => tunnel::Word::Free,
                    });
                }
                return;
            }
            TunnelWish::Close => {
                self.peer = None;
                if let Some(tunnel) = &self.tunnel {
                    tunnel.close();
                }
                return;
            }
        };
        match made {
            Ok(tunnel) => self.tunnel = Some(tunnel),
            Err(reason) => self.feed_back(Input::Tunnel(TunnelEvent::Failed { reason })),
        }
    }

    fn missed(&mut self, wish: Missed) {
        match wish {
            Missed::Keep => {
                if let Some(definition) = &self.task.saved().definition {
                    let to = To::of(self.task.saved());
                    self.standstill.keep(&self.shared, &self.ports, definition, to);
                }
            }
            Missed::HandOver {
                to,
                granted,
                stood_at_ms,
            } => {
                let of = Move {
                    vm: self.vm,
                    to,
                    granted,
                    stood_at_ms,
                };
                self.standstill.hand_over(&self.shared, of);
            }
            Missed::Drop => self.standstill.forget(),
        }
    }

    fn say(&mut self, word: Peer) {
        if word.message == Message::Release {
            // From here on it is the destination that announces the guest, unless it comes back.
            self.ports.close();
        }
        match &mut self.said {
            (Some(message), times) if *message == word.message => *times += 1,
            said => *said = (Some(word.message), 1),
        }
        if let Role::Source { to, terms, .. } = &self.task.saved().role
            && terms.destination == word.host
        {
            self.shared
                .peers
                .ensure(&self.shared, word.host, SocketAddr::new(to.address, to.peer_port));
        }
        let from = self.shared.host();
        let relay = Relay {
            vm: self.vm,
            granted: word.granted,
            from,
            to: word.host,
            message: word.message,
        };
        self.shared.peers.say(&self.shared, relay, self.said.1 > DIRECT_WORDS);
    }
}

/// Removes a VM's directory of logs; one that is not there is removed already.
pub(crate) fn remove_logs(directory: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

async fn next_of(machine: &mut Option<qemu::Vm>) -> Option<Happened> {
    match machine {
        Some(machine) => machine.next().await,
        None => std::future::pending().await,
    }
}

/// Finds a VM's process again. One that is there but does not answer is tried again and again, since its guest may run; until the task
/// says that it is to end.
async fn adopt(shared: &Shared, vm: VmId, end_deaf: &AtomicBool) -> Result<qemu::Vm, String> {
    let run_dir = shared.config.vm_run_dir(vm);
    loop {
        match qemu::Vm::adopt(vm, &run_dir).await {
            Ok(machine) => return Ok(machine),
            Err(error @ qemu::AdoptError::Gone) => return Err(chain(&error)),
            Err(error) => {
                tracing::warn!(%vm, error = &error as &dyn std::error::Error, "the VM's process does not answer yet");
                if let qemu::AdoptError::Deaf { process, .. } = &error
                    && end_deaf.load(Ordering::Acquire)
                    && let Err(error) =
                        Pinned::find(*process).and_then(|found| found.map_or(Ok(()), |found| found.kill()))
                {
                    tracing::warn!(%vm, %error, "the VM's process was not ended");
                }
                tokio::time::sleep(ADOPT_AGAIN).await;
            }
        }
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Fetches blobs that are missing, makes or finds volumes, makes the taps.
async fn prepare(
    shared: &Arc<Shared>,
    definition: Box<Definition>,
    mode: Mode,
    operation: Option<OperationId>,
    given_up: oneshot::Receiver<()>,
) -> Result<Prepared, Refusal> {
    let home = named(shared, definition.pool)?;
    let vm = definition.vm;
    tokio::select! {
        fetched = fetch(shared, &home, &definition, operation) => fetched?,
        _ = given_up => return Err(Refusal::new(Code::Cancelled, format!("VM {vm}: its start was given up"))),
    }
    let shared = Arc::clone(shared);
    tokio::task::spawn_blocking(move || build(&shared, definition, mode))
        .await
        .map_err(|_| Refusal::new(Code::HostFailed, format!("VM {vm}: preparing it broke off")))?
}

/// A port's tap, blocked, and judged from its first frame on.
fn attach(shared: &Shared, vm: VmId, port: &PortUse) -> Result<(OwnedFd, Port), Refusal> {
    let failed = |what: &str, why: String| Refusal::new(Code::HostFailed, format!("VM {vm}: {what}: {why}"));
    let tap = new_tap(shared, port).map_err(|why| failed("its network port was not made", why))?;
    // Before it can be opened: nothing is ever let through that was not judged.
    let judged = shared.policies.prepare(&shared.network, port);
    judged.map_err(|error| failed("the rules of its network port were not set", chain(&error)))?;
    Ok((tap.fd, tap.port))
}

/// Fetches what the VM's pool lacks of its template.
async fn fetch(
    shared: &Arc<Shared>,
    home: &Arc<NamedPool>,
    definition: &Definition,
    operation: Option<OperationId>,
) -> Result<(), Refusal> {
    match (&definition.template, &definition.boot) {
        (Some(template), _) => blobs::ensure(shared, home, template, operation).await,
        (None, Boot::Direct { kernel, initrd, .. }) => {
            blobs::fetch(shared, home, *kernel, &[], |_| {}).await?;
            blobs::fetch(shared, home, *initrd, &[], |_| {}).await
        }
        (None, Boot::Bios) => Ok(()),
    }
}

fn build(shared: &Shared, definition: Box<Definition>, mode: Mode) -> Result<Prepared, Refusal> {
    let vm = definition.vm;
    let uid = uid_of(vm);
    let failed = |what: &str, why: String| Refusal::new(Code::HostFailed, format!("VM {vm}: {what}: {why}"));
    let home = named(shared, definition.pool)?;
    let mut given = Given::default();
    if let Boot::Direct { kernel, initrd, .. } = &definition.boot {
        let open = |digest| {
            let blob = home.pool.open_blob(digest);
            blob.map_err(|error| failed("its kernel cannot be opened", chain(&error)))
        };
        given.boot = Some(GivenKernel {
            kernel: open(kernel.digest)?.into(),
            initrd: open(initrd.digest)?.into(),
        });
    }
    for volume in &definition.volumes {
        let place = volume.place;
        let pool = named(shared, place.pool)?;
        let base = volume.base.map(|base| Base {
            digest: base.digest,
            format: base.format,
        });
        if mode == Mode::Boot {
            let request = VolumeRequest {
                id: place.volume,
                format: place.format,
                size_bytes: volume.size_bytes,
                base,
            };
            pool.pool
                .create_volume(&request)
                .map_err(|error| failed("its disk was not made", chain(&error)))?;
            let given = pool.pool.give_volume(place.volume, place.format, uid, uid);
            given.map_err(|error| failed("its disk could not be given to it", chain(&error)))?;
        } else {
            let seen = pool.pool.volume_usage(place.volume, place.format);
            seen.map_err(|error| failed("its disk is not reachable from here", chain(&error)))?;
        }
        let open = pool.pool.open_volume(place.volume, place.format);
        let open = open.map_err(|error| failed("its disk cannot be opened", chain(&error)))?;
        let base = base.map(|base| pool.pool.open_blob(base.digest)).transpose();
        let base = base.map_err(|error| failed("its disk's base cannot be opened", chain(&error)))?;
        given.volumes.push(GivenVolume {
            write: open.write,
            read: open.read,
            base: base.map(Into::into),
        });
    }
    given.seed = seeds::disk(shared, &definition, mode)?;
    let ports = definition.ports.iter().map(|port| attach(shared, vm, port));
    let (taps, ports) = ports.collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
    given.taps = taps;
    let run_dir = shared.config.vm_run_dir(vm);
    let launch = Launch {
        definition: *definition,
        mode,
        run_dir,
        uid,
    };
    Ok(Prepared {
        launch: Box::new(launch),
        given,
        ports,
    })
}

/// The tap of a port, blocked; what its guest asks its host goes no further.
fn new_tap(shared: &Shared, port: &PortUse) -> Result<Tap, String> {
    let network = &shared.network;
    network.remove(port.port).map_err(|error| chain(&error))?;
    let tap = network
        .create_tap(port.port, &shared.bridge)
        .map_err(|error| chain(&error))?;
    let answered = network.set_answered(&tap.port, desks::answered(port));
    answered.map_err(|error| chain(&error))?;
    Ok(tap)
}

/// The VM's volumes, and its seed, which lies beside them.
fn delete_volumes(shared: &Shared, vm: VmId, volumes: &[VolumePlace]) -> Result<(), Refusal> {
    for place in volumes {
        let pool = named(shared, place.pool)?;
        pool.pool.delete_seed(vm).map_err(|error| {
            let message = format!("the seed of VM {vm} was not deleted: {}", chain(&error));
            Refusal::new(Code::HostFailed, message)
        })?;
        pool.pool.delete_volume(place.volume, place.format).map_err(|error| {
            Refusal::new(
                Code::HostFailed,
                format!("volume {} was not deleted: {}", place.volume, chain(&error)),
            )
        })?;
    }
    Ok(())
}
