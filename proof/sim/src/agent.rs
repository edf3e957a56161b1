//! A host and its agent: the journal, one task a VM, and how the tasks' effects are carried out. As `host/agent` does it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use driver::{Action, Condition, Happened, Launch, Mode};
use handover::Source;
use model::{
    BootId, Code, Definition, Generation, HostId, Message, Refusal, Report, VmId,
    order::{Order, PortReport, Relay, TemplateReport, VmObserved, VolumePlace},
};
use task::{Effect, Input, Peer, Role, Saved, Task, Timer, Tunnel};
use uuid::Uuid;

use crate::{
    Checked, Happens, Sim,
    copy::{End, Flow},
    process::Process,
};

/// What was written this long ago survives a loss of power.
const SYNCED_AFTER_MS: u64 = 20;
/// A word that was said this often without an answer also goes by way of the controller.
const DIRECT_WORDS: u32 = 2;

/// One VM's task within a living agent.
pub(crate) struct Runner {
    pub(crate) task: Task,
    timers: BTreeMap<Timer, u64>,
    said: (Option<Message>, u32),
    shown: VmObserved,
    /// What was last told of the destination's agent, and when it is heard.
    link: (Option<bool>, u64),
}

/// A host.
pub(crate) struct Host {
    pub(crate) id: HostId,
    pub(crate) boot: u64,
    pub(crate) on: bool,
    /// The living agent's incarnation.
    pub(crate) agent: Option<u64>,
    pub(crate) tasks: BTreeMap<VmId, Runner>,
    pub(crate) journal: BTreeMap<VmId, Saved>,
    /// When what was written over what, oldest first.
    unsynced: Vec<(u64, VmId, Option<Saved>)>,
    pub(crate) reports: VecDeque<(u64, Report)>,
    last_report: u64,
    pub(crate) session: Option<u64>,
    /// The way to the controller is open.
    pub(crate) reachable: bool,
    pub(crate) down_until: u64,
    pub(crate) up_until: u64,
    pub(crate) tunnels: BTreeMap<(VmId, Generation), End>,
    /// Ports, and whether frames pass.
    pub(crate) ports: BTreeMap<VmId, bool>,
    pub(crate) run_dirs: BTreeSet<VmId>,
}

impl Host {
    pub(crate) fn new(n: usize) -> Self {
        Self {
            id: HostId(Uuid::from_u128(0x100 + n as u128)),
            boot: 1,
            on: true,
            agent: None,
            tasks: BTreeMap::new(),
            journal: BTreeMap::new(),
            unsynced: vec![],
            reports: VecDeque::new(),
            last_report: 0,
            session: None,
            reachable: true,
            down_until: 0,
            up_until: 0,
            tunnels: BTreeMap::new(),
            ports: BTreeMap::new(),
            run_dirs: BTreeSet::new(),
        }
    }

    /// This boot of it.
    pub(crate) fn boot_id(&self) -> BootId {
        BootId(Uuid::from_u128((self.id.0.as_u128() << 32) | u128::from(self.boot)))
    }
}

impl Sim {
    pub(crate) fn host_index(&self, id: HostId) -> Option<usize> {
        self.hosts.iter().position(|host| host.id == id)
    }

    /// Tells a task something soon, unless its agent dies first.
    pub(crate) fn feed(&mut self, least: u64, most: u64, host: usize, vm: VmId, input: Input) {
        let at = self.now + self.chance.between(least, most);
        self.feed_at(at, host, vm, input);
    }

    pub(crate) fn feed_at(&mut self, at: u64, host: usize, vm: VmId, input: Input) {
        if let Some(agent) = self.hosts[host].agent {
            let input = Box::new(input);
            self.at(at, Happens::Input { host, agent, vm, input });
        }
    }

    pub(crate) fn input(&mut self, host: usize, agent: u64, vm: VmId, input: Input) -> Checked {
        if self.hosts[host].agent != Some(agent) {
            return Ok(());
        }
        self.step_task(host, vm, input)
    }

    pub(crate) fn timer(&mut self, host: usize, agent: u64, vm: VmId, timer: Timer, stamp: u64) -> Checked {
        let runner = self.hosts[host].tasks.get_mut(&vm);
        let due = runner.is_some_and(|runner| {
            let due = runner.timers.get(&timer) == Some(&stamp);
            if due {
                runner.timers.remove(&timer);
            }
            due
        });
        if due {
            self.input(host, agent, vm, Input::Timer(timer))
        } else {
            Ok(())
        }
    }

    fn step_task(&mut self, host: usize, vm: VmId, input: Input) -> Checked {
        let Some(runner) = self.hosts[host].tasks.get_mut(&vm) else {
            return Ok(());
        };
        let effects = runner.task.step(input);
        self.carry_out(host, vm, effects)
    }

    /// Carries effects out in order; the agent may die between any two.
    fn carry_out(&mut self, host: usize, vm: VmId, effects: Vec<Effect>) -> Checked {
        let mut gone = false;
        for effect in effects {
            if self.options.faults && !self.calm && self.chance.one_in(250) {
                self.count("agent died between two effects");
                self.note(|| format!("h{host} agent dies before {effect:?}"));
                return self.agent_dies(host);
            }
            self.note(|| format!("h{host}   {}", short(&effect)));
            gone |= effect == Effect::Gone;
            self.effect(host, vm, effect)?;
        }
        if let Some(runner) = self.hosts[host].tasks.get_mut(&vm) {
            runner.shown = runner.task.observed();
        }
        if gone {
            self.hosts[host].tasks.remove(&vm);
        }
        Ok(())
    }

    fn effect(&mut self, host: usize, vm: VmId, effect: Effect) -> Checked {
        match effect {
            Effect::Save(saved) => self.save(host, vm, *saved),
            Effect::Prepare { definition, mode } => self.prepare(host, vm, *definition, mode),
            Effect::Spawn(launch) => return self.spawn(host, vm, &launch),
            Effect::Adopt => match self.process_of(host, vm) {
                Some(id) => {
                    let condition = self.processes[&id].condition;
                    self.tell_after(id, 5, 700, Happened::Up { condition });
                }
                None => self.not_up(host, vm, "it is gone"),
            },
            Effect::Act(action) => {
                self.check_heard(host, vm, &action)?;
                self.ask(host, vm, action);
            }
            Effect::OpenPorts => drop(self.hosts[host].ports.insert(vm, true)),
            Effect::Clear => {
                if self.process_of(host, vm).is_some() {
                    return Err(format!("h{host} clears VM {vm} away while its process lives"));
                }
                self.hosts[host].ports.remove(&vm);
                self.hosts[host].run_dirs.remove(&vm);
            }
            Effect::DeleteFiles(volumes) => {
                if let Some(agent) = self.hosts[host].agent {
                    self.after(
                        1,
                        50,
                        Happens::Deleted {
                            host,
                            agent,
                            vm,
                            volumes,
                        },
                    );
                }
            }
            Effect::Tunnel(wish) => return self.tunnel(host, vm, wish),
            Effect::Say(word) => self.say(host, vm, word),
            Effect::Set(timer, after) => self.set_timer(host, vm, timer, after.0),
            Effect::Stop(timer) => {
                if let Some(runner) = self.hosts[host].tasks.get_mut(&vm) {
                    runner.timers.remove(&timer);
                }
            }
            Effect::Report(report) => self.push_report(host, Report::Vm(report)),
            Effect::Progress(..) | Effect::Missed(_) | Effect::Gone => {}
        }
        Ok(())
    }

    fn save(&mut self, host: usize, vm: VmId, saved: Saved) {
        let now = self.now;
        let host = &mut self.hosts[host];
        host.unsynced.retain(|(at, ..)| at + SYNCED_AFTER_MS > now);
        let before = host.journal.insert(vm, saved);
        host.unsynced.push((now, vm, before));
    }

    fn prepare(&mut self, host: usize, vm: VmId, definition: Definition, mode: Mode) {
        let places = definition.volumes.iter().map(|volume| volume.place.volume);
        let missing = mode == Mode::Wait && places.clone().any(|volume| !self.disks.contains(&volume));
        if missing || (!self.calm && self.chance.one_in(40)) {
            let reason = Refusal::new(Code::HostFailed, "its disk is not reachable from here");
            return self.feed(5, 60, host, vm, Input::Prepared(Err(reason)));
        }
        self.disks.extend(places);
        self.hosts[host].ports.insert(vm, false);
        let launch = Launch {
            mode,
            run_dir: format!("/run/godwit/{vm}").into(),
            uid: 0,
            definition,
        };
        self.feed(5, 60, host, vm, Input::Prepared(Ok(Box::new(launch))));
    }

    fn spawn(&mut self, host: usize, vm: VmId, launch: &Launch) -> Checked {
        if self.process_of(host, vm).is_some() {
            return Err(format!("h{host} starts a second process of VM {vm}"));
        }
        self.hosts[host].run_dirs.insert(vm);
        if !self.calm && self.chance.one_in(40) {
            self.not_up(host, vm, "QEMU did not start");
            return Ok(());
        }
        let memory_mib = self.memory_of(vm);
        let id = self.fresh();
        let process = Process::new(host, vm, memory_mib, launch.mode);
        let condition = process.condition;
        self.processes.insert(id, process);
        self.tell_after(id, 20, 120, Happened::Up { condition });
        self.check_capacity(host)
    }

    fn not_up(&mut self, host: usize, vm: VmId, reason: &str) {
        let reason = reason.to_owned();
        self.feed(5, 40, host, vm, Input::Driver(Happened::NotUp { reason }));
    }

    fn tunnel(&mut self, host: usize, vm: VmId, wish: Tunnel) -> Checked {
        match wish {
            Tunnel::Listen(terms) => self.tunnel_listens(host, vm, terms.granted),
            Tunnel::Dial(terms, _) => {
                let to = self
                    .host_index(terms.destination)
                    .ok_or("terms name a host that is none")?;
                self.tunnel_dials(host, vm, terms.granted, to);
                self.watch_link(host, vm);
            }
            Tunnel::Adopt => {
                self.tunnel_adopted(host, vm);
                self.watch_link(host, vm);
            }
            Tunnel::Flow => self.tunnel_flow(host, vm, Flow::Flowing),
            Tunnel::Hold => self.tunnel_flow(host, vm, Flow::Held),
            Tunnel::Free => self.tunnel_flow(host, vm, Flow::Free),
            Tunnel::Close => return self.tunnel_closed(host, vm),
        }
        Ok(())
    }

    /// No guest is asked to stand for a move of which the destination's agent could not be told.
    fn check_heard(&self, host: usize, vm: VmId, action: &Action) -> Checked {
        let role = self.hosts[host].tasks.get(&vm).map(|runner| &runner.task.saved().role);
        let unheard = matches!(
            role,
            Some(Role::Source {
                state: Source::Copying { connected: false, .. },
                ..
            })
        );
        match unheard && *action == Action::Stand {
            true => Err(format!(
                "h{host} asks VM {vm} to stand, and the other agent does not hear it"
            )),
            false => Ok(()),
        }
    }

    fn watch_link(&mut self, host: usize, vm: VmId) {
        if let Some(runner) = self.hosts[host].tasks.get_mut(&vm) {
            runner.link.0 = None;
        }
        self.links_changed();
    }

    /// Tells sources whether the destination's agent hears them, where that has changed.
    pub(crate) fn links_changed(&mut self) {
        for host in 0..self.hosts.len() {
            let sources = self.hosts[host].tasks.iter().filter_map(|(vm, runner)| {
                let Role::Source { terms, .. } = &runner.task.saved().role else {
                    return None;
                };
                Some((*vm, terms.destination, runner.link))
            });
            for (vm, destination, (told, until)) in sources.collect::<Vec<_>>() {
                let Some(to) = self.host_index(destination) else {
                    continue;
                };
                let up = self.hosts[to].agent.is_some() && !self.is_cut(host, to);
                if told == Some(up) {
                    continue;
                }
                // In order: what comes later is the truth.
                let at = until.max(self.now + self.chance.between(1, 300));
                if let Some(runner) = self.hosts[host].tasks.get_mut(&vm) {
                    runner.link = (Some(up), at);
                }
                self.feed_at(at, host, vm, Input::PeerLink { up });
            }
        }
    }

    pub(crate) fn deleted(&mut self, host: usize, agent: u64, vm: VmId, volumes: &[VolumePlace]) -> Checked {
        // A container that still waits has not touched them, and ends by itself.
        if let Some(process) = self
            .processes
            .values()
            .find(|process| process.vm == vm && !volumes.is_empty() && process.condition != Condition::Loading)
        {
            return Err(format!(
                "h{host} deletes the disks of VM {vm}, which h{} still has",
                process.host
            ));
        }
        let failed = !self.calm && self.chance.one_in(30);
        let result = if failed {
            Err(Refusal::new(Code::HostFailed, "a disk was not deleted"))
        } else {
            for place in volumes {
                self.disks.remove(&place.volume);
            }
            Ok(())
        };
        self.input(host, agent, vm, Input::FilesDeleted(result))
    }

    fn say(&mut self, host: usize, vm: VmId, word: Peer) {
        let Some(runner) = self.hosts[host].tasks.get_mut(&vm) else {
            return;
        };
        match &mut runner.said {
            (Some(message), times) if *message == word.message => *times += 1,
            said => *said = (Some(word.message), 1),
        }
        let relayed = runner.said.1 > DIRECT_WORDS;
        let word = Relay {
            vm,
            granted: word.granted,
            from: self.hosts[host].id,
            to: word.host,
            message: word.message,
        };
        if relayed {
            self.push_report(host, Report::Relay(word));
        }
        let Some(to) = self.host_index(word.to) else { return };
        let lost = self.is_cut(host, to) || (!self.calm && self.chance.one_in(8));
        let copies = if lost {
            0
        } else {
            1 + u64::from(!self.calm && self.chance.one_in(15))
        };
        for _ in 0..copies {
            self.after(1, 25, Happens::Word { to, word });
        }
    }

    fn set_timer(&mut self, host: usize, vm: VmId, timer: Timer, after: u64) {
        let stamp = self.fresh();
        let entry = &mut self.hosts[host];
        let (Some(agent), Some(runner)) = (entry.agent, entry.tasks.get_mut(&vm)) else {
            return;
        };
        runner.timers.insert(timer, stamp);
        self.at(
            self.now + after,
            Happens::Timer {
                host,
                agent,
                vm,
                timer,
                stamp,
            },
        );
    }

    /// A word from another agent, direct or relayed.
    pub(crate) fn word(&mut self, to: usize, word: Relay) -> Checked {
        let host = &self.hosts[to];
        let known = host.tasks.contains_key(&word.vm) || host.journal.contains_key(&word.vm);
        if host.agent.is_none() || !known {
            return Ok(());
        }
        let peer = Peer {
            host: word.from,
            granted: word.granted,
            message: word.message,
        };
        self.begin_runner(to, word.vm)?;
        self.step_task(to, word.vm, Input::Peer(peer))
    }

    /// Begins a VM's task where there is none, from the journal if that knows it.
    fn begin_runner(&mut self, host: usize, vm: VmId) -> Checked {
        let entry = &mut self.hosts[host];
        if entry.tasks.contains_key(&vm) || entry.agent.is_none() {
            return Ok(());
        }
        let (task, effects) = match entry.journal.get(&vm) {
            Some(saved) => Task::recover(saved.clone(), entry.id, entry.boot_id()),
            None => (Task::new(vm, entry.id, entry.boot_id()), vec![]),
        };
        let shown = task.observed();
        let runner = Runner {
            task,
            timers: BTreeMap::new(),
            said: (None, 0),
            shown,
            link: (None, 0),
        };
        entry.tasks.insert(vm, runner);
        self.carry_out(host, vm, effects)
    }

    pub(crate) fn obey(&mut self, host: usize, order: Order) -> Checked {
        match order {
            Order::Vm(order) => {
                let vm = order.vm;
                self.begin_runner(host, vm)?;
                self.step_task(host, vm, Input::Order(order))
            }
            Order::Template(order) => {
                let report = TemplateReport {
                    operation: order.operation,
                    template: order.template,
                    pool: order.pool,
                    refused: None,
                    content: None,
                };
                self.push_report(host, Report::Template(report));
                Ok(())
            }
            // What passes a port is judged by the kernel: here it is in force at once.
            Order::Port(order) => {
                let report = PortReport {
                    port: order.port.port,
                    revision: order.port.policy.revision,
                    refused: None,
                };
                self.push_report(host, Report::Port(report));
                Ok(())
            }
            Order::Relay(word) => self.word(host, word),
            // Blobs are no part of what is simulated.
            Order::Lend(_) => Ok(()),
        }
    }

    pub(crate) fn push_report(&mut self, host: usize, report: Report) {
        let entry = &mut self.hosts[host];
        if entry.agent.is_none() {
            return;
        }
        entry.last_report += 1;
        let number = entry.last_report;
        entry.reports.push_back((number, report.clone()));
        self.send_up(host, number, report);
    }

    pub(crate) fn inventory(&self, host: usize) -> Vec<VmObserved> {
        let host = &self.hosts[host];
        let known = host.journal.iter().map(|(vm, saved)| {
            let shown = host.tasks.get(vm).map(|runner| runner.shown.clone());
            shown.unwrap_or_else(|| Task::recover(saved.clone(), host.id, saved.boot).0.observed())
        });
        known.collect()
    }

    pub(crate) fn agent_starts(&mut self, host: usize) -> Checked {
        if !self.hosts[host].on || self.hosts[host].agent.is_some() {
            return Ok(());
        }
        let agent = self.fresh();
        let entry = &mut self.hosts[host];
        entry.agent = Some(agent);
        entry.last_report = 0;
        let boot = entry.boot_id();
        let mut saved: Vec<&Saved> = entry.journal.values().collect();
        saved.retain(|saved| saved.role != Role::None || saved.pending.is_some() || saved.boot == boot);
        saved.sort_by_key(|saved| matches!(saved.role, Role::Holder | Role::None));
        let vms: Vec<VmId> = saved.iter().map(|saved| saved.vm).collect();
        for vm in vms {
            self.begin_runner(host, vm)?;
        }
        self.after(5, 300, Happens::Connects { host });
        self.links_changed();
        Ok(())
    }

    /// kill -9: what it held in memory is gone, its VMs are not.
    pub(crate) fn agent_dies(&mut self, host: usize) -> Checked {
        let entry = &mut self.hosts[host];
        entry.agent = None;
        entry.tasks.clear();
        entry.reports.clear();
        let held = entry.tunnels.values_mut().filter(|end| end.flow == Flow::Flowing);
        held.for_each(|end| end.flow = Flow::Held);
        self.links_changed();
        self.after(100, 8_000, Happens::AgentStarts { host });
        self.session_ends(host)
    }

    /// The host loses power: no process, no port, and maybe not the last records.
    pub(crate) fn power_off(&mut self, host: usize) -> Checked {
        if !self.hosts[host].on {
            return Ok(());
        }
        let now = self.now;
        self.agent_dies(host)?;
        let lost = self.chance.index(4);
        let entry = &mut self.hosts[host];
        entry.on = false;
        entry.boot += 1;
        entry.ports.clear();
        entry.run_dirs.clear();
        entry.unsynced.retain(|(at, ..)| at + SYNCED_AFTER_MS > now);
        for _ in 0..lost {
            match entry.unsynced.pop() {
                Some((_, vm, Some(before))) => drop(entry.journal.insert(vm, before)),
                Some((_, vm, None)) => drop(entry.journal.remove(&vm)),
                None => break,
            }
        }
        entry.unsynced.clear();
        let ends: Vec<_> = entry.tunnels.keys().copied().collect();
        let dead: Vec<u64> = self
            .processes
            .iter()
            .filter(|(_, process)| process.host == host)
            .map(|(&id, _)| id)
            .collect();
        for id in dead {
            self.processes.remove(&id);
            self.copies_of_dead(id)?;
        }
        for (vm, granted) in ends {
            self.tunnel_gone(host, vm, granted)?;
        }
        self.after(2_000, 30_000, Happens::PowerOn { host });
        Ok(())
    }

    pub(crate) fn power_on(&mut self, host: usize) -> Checked {
        self.hosts[host].on = true;
        self.agent_starts(host)
    }
}

/// An effect in few words.
fn short(effect: &Effect) -> String {
    match effect {
        Effect::Prepare { mode, .. } => format!("Prepare {mode:?}"),
        Effect::Spawn(launch) => format!("Spawn {:?}", launch.mode),
        Effect::Save(saved) => format!("Save {:?} {:?}", saved.role, saved.pending),
        other => format!("{other:?}"),
    }
}
