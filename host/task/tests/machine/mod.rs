//! Machines for tests: each carries out a task's effects at once and in order, keeps its journal, and dies before the effect it is told to.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::{BTreeSet, VecDeque};

use driver::{Action, Condition, CopyCost, CopyState, Happened, Launch, Mode};
use model::{
    BootId, Definition, Epoch, Generation, HostId, Mac, Millis, OperationId, PoolId, PortId, Revision, Terms, VmId,
    VolumeId,
    host::Accelerator,
    layout::{Device, DeviceKind, Family, Layout},
    order::{Endpoint, Happening, PortUse, Verb, VmOrder, VolumePlace, VolumeUse},
    storage::Format,
    template::Boot,
};
use task::{Effect, Input, Missed, Saved, Task, Timer, Tunnel, TunnelEvent};
use uuid::Uuid;

pub(crate) const VM: VmId = VmId(Uuid::from_u128(1));

pub(crate) fn host(n: u128) -> HostId {
    HostId(Uuid::from_u128(0x100 + n))
}

pub(crate) fn boot(n: u128) -> BootId {
    BootId(Uuid::from_u128(0xb00 + n))
}

pub(crate) fn place() -> VolumePlace {
    VolumePlace {
        volume: VolumeId(Uuid::from_u128(5)),
        pool: PoolId(Uuid::from_u128(6)),
        format: Format::Qcow2,
    }
}

pub(crate) fn definition() -> Box<Definition> {
    let port = PortId(Uuid::from_u128(7));
    Box::new(Definition {
        template: None,
        vm: VM,
        name: "web1".parse().expect("a name"),
        layout: layout(port),
        boot: Boot::Bios,
        pool: place().pool,
        volumes: vec![VolumeUse {
            place: place(),
            size_bytes: 1 << 30,
            base: None,
        }],
        ports: vec![PortUse {
            port,
            mac: Mac::of_port(port),
            ip: [10, 91, 0, 2].into(),
            prefix: 16,
            gateway: None,
            mtu: 1500,
            v6: None,
            addressing: model::addressing::Addressing::default(),
            policy: model::PortPolicy::default(),
        }],
    })
}

fn layout(port: PortId) -> Layout {
    let device = |id: &str, slot, kind| Device {
        id: id.to_owned(),
        bus: "pcie.0".to_owned(),
        slot,
        kind,
    };
    let volume = place().volume;
    Layout {
        version: Layout::VERSION,
        family: Family::Q35,
        machine: "pc-q35-7.2".to_owned(),
        accelerator: Accelerator::Tcg,
        cpu: "qemu64".to_owned(),
        vcpus: 1,
        memory_mib: 256,
        devices: vec![
            device("net0", 2, DeviceKind::Net { port }),
            device("disk0", 10, DeviceKind::Disk { volume }),
        ],
        seed: None,
    }
}

pub(crate) fn terms() -> Terms {
    Terms {
        vm: VM,
        operation: OperationId(Uuid::from_u128(9)),
        source: host(0),
        source_boot: boot(0),
        destination: host(1),
        destination_boot: boot(1),
        held: Generation(1),
        granted: Generation(2),
        reclaimed: Generation(3),
        run: true,
        deadline: Millis::seconds(60),
        settle: Millis::seconds(5),
    }
}

pub(crate) fn order(generation: u64, revision: u64, verb: Verb) -> VmOrder {
    VmOrder {
        epoch: Epoch(1),
        vm: VM,
        generation: Generation(generation),
        revision: Revision(revision),
        operation: OperationId(Uuid::from_u128(9)),
        verb,
    }
}

pub(crate) fn start() -> Verb {
    Verb::Start {
        definition: definition(),
        paused: false,
        seed: None,
    }
}

pub(crate) fn endpoint() -> Endpoint {
    Endpoint {
        address: [127, 0, 0, 1].into(),
        tunnel_port: 4000,
        peer_port: 4001,
    }
}

/// One host with one VM.
pub(crate) struct Machine {
    pub(crate) n: u128,
    pub(crate) task: Option<Task>,
    pub(crate) boot: BootId,
    pub(crate) journal: Option<Saved>,
    /// All records that were written.
    pub(crate) records: Vec<Saved>,
    pub(crate) process: Option<Condition>,
    pub(crate) disk: bool,
    /// A port or a run directory is there.
    pub(crate) residue: bool,
    pub(crate) timers: BTreeSet<Timer>,
    pub(crate) inputs: VecDeque<Input>,
    pub(crate) reports: Vec<Happening>,
    /// What its hypervisor or its task wants of the other machine.
    pub(crate) outside: Vec<Outside>,
    /// Whether the other machine's agent hears this one.
    pub(crate) peer_up: bool,
    /// What was wanted of the stream.
    pub(crate) flows: Vec<Tunnel>,
    /// What was wanted of the frames that its guest misses.
    pub(crate) missed: Vec<Missed>,
    pub(crate) resets: u32,
    /// Whether the guest heeds the power button.
    pub(crate) heeds: bool,
    /// Times that its hypervisor refuses to run the guest.
    pub(crate) refuses: u32,
    /// Times that it refuses to end the process.
    pub(crate) clings: u32,
    /// Times that it refuses what is asked about a copy.
    pub(crate) denies: u32,
    /// Pauses before it was told to do something again.
    pub(crate) pauses: Vec<Millis>,
    /// Effects until it dies.
    pub(crate) dies_in: Option<u32>,
    /// Effects so far.
    pub(crate) effects: u32,
}

/// What concerns the other machine.
#[derive(Clone, Debug)]
pub(crate) enum Outside {
    Word(task::Peer),
    Copy,
    CopyCancelled,
    Stood,
    Closed,
}

impl Machine {
    pub(crate) fn new(n: u128) -> Self {
        Self {
            n,
            task: Some(Task::new(VM, host(n), boot(n))),
            boot: boot(n),
            journal: None,
            records: vec![],
            process: None,
            disk: false,
            residue: false,
            timers: BTreeSet::new(),
            inputs: VecDeque::new(),
            reports: vec![],
            outside: vec![],
            peer_up: true,
            flows: vec![],
            missed: vec![],
            resets: 0,
            heeds: true,
            refuses: 0,
            clings: 0,
            denies: 0,
            pauses: vec![],
            dies_in: None,
            effects: 0,
        }
    }

    /// The agent hears the process no longer; what it had to tell is lost.
    pub(crate) fn loses_sight(&mut self) {
        if self.process.is_some() {
            self.inputs.retain(|input| !matches!(input, Input::Driver(_)));
            self.inputs.push_front(Input::Lost);
        }
    }

    pub(crate) fn order(&mut self, order: VmOrder) {
        self.inputs.push_back(Input::Order(Box::new(order)));
    }

    /// Takes one input, if there is one and an agent to take it.
    pub(crate) fn turn(&mut self) -> bool {
        let Some(mut task) = self.task.take() else { return false };
        let Some(input) = self.inputs.pop_front() else {
            self.task = Some(task);
            return false;
        };
        let effects = task.step(input);
        self.carry_out(task, effects);
        true
    }

    pub(crate) fn carry_out(&mut self, task: Task, effects: Vec<Effect>) {
        for effect in effects {
            if self.dies_in == Some(0) {
                // Dead: what was told to the agent goes with it.
                self.dies_in = None;
                self.inputs.clear();
                self.timers.clear();
                return;
            }
            self.dies_in = self.dies_in.map(|left| left - 1);
            self.effects += 1;
            self.effect(effect);
        }
        self.task = Some(task);
    }

    /// The agent begins again, in the same boot or after the host lost power.
    pub(crate) fn restart(&mut self, rebooted: bool) {
        if self.task.is_some() {
            return;
        }
        if rebooted {
            self.process = None;
            self.residue = false;
            self.boot = boot(100 + self.n);
        }
        let (task, effects) = match self.journal.clone() {
            Some(saved) => Task::recover(saved, host(self.n), self.boot),
            None => (Task::new(VM, host(self.n), self.boot), vec![]),
        };
        self.carry_out(task, effects);
    }

    fn tell(&mut self, happened: Happened) {
        self.inputs.push_back(Input::Driver(happened));
    }

    fn effect(&mut self, effect: Effect) {
        match effect {
            Effect::Save(saved) => {
                self.records.push((*saved).clone());
                self.journal = Some(*saved);
            }
            Effect::Prepare { definition, mode } => {
                self.residue = true;
                self.disk = true;
                let launch = Launch {
                    definition: *definition,
                    mode,
                    run_dir: "/run/godwit/web1".into(),
                    uid: 1,
                };
                self.inputs.push_back(Input::Prepared(Ok(Box::new(launch))));
            }
            Effect::Spawn(launch) => {
                assert!(self.process.is_none(), "a second process");
                let condition = if launch.mode == Mode::Boot {
                    Condition::Standing
                } else {
                    Condition::Loading
                };
                self.process = Some(condition);
                self.tell(Happened::Up { condition });
            }
            Effect::Adopt => match self.process {
                Some(condition) => self.tell(Happened::Up { condition }),
                None => self.tell(Happened::NotUp {
                    reason: "gone".to_owned(),
                }),
            },
            Effect::Act(action) => self.act(&action),
            Effect::OpenPorts => self.residue = true,
            Effect::Clear => {
                assert!(self.process.is_none(), "cleared while its process lives");
                self.residue = false;
            }
            Effect::DeleteFiles(volumes) => {
                assert!(self.process.is_none(), "deleted while its process lives");
                self.disk &= volumes.is_empty();
                self.inputs.push_back(Input::FilesDeleted(Ok(())));
            }
            Effect::Tunnel(wish) => self.tunnel(&wish),
            Effect::Say(word) => self.outside.push(Outside::Word(word)),
            Effect::Set(timer, after) => {
                if timer == Timer::Retry {
                    self.pauses.push(after);
                }
                self.timers.insert(timer);
            }
            Effect::Stop(timer) => drop(self.timers.remove(&timer)),
            Effect::Report(report) => self.reports.push(report.what),
            Effect::Missed(missed) => self.missed.push(missed),
            Effect::Progress(..) | Effect::Gone => {}
        }
    }

    fn tunnel(&mut self, wish: &Tunnel) {
        let event = match wish {
            Tunnel::Listen(_) => TunnelEvent::Listening { port: 4000 },
            Tunnel::Dial(..) => {
                self.inputs.push_back(Input::PeerLink { up: self.peer_up });
                TunnelEvent::Connected
            }
            Tunnel::Adopt => return self.inputs.push_back(Input::PeerLink { up: self.peer_up }),
            Tunnel::Flow | Tunnel::Hold | Tunnel::Free => return self.flows.push(wish.clone()),
            Tunnel::Close => {
                self.outside.push(Outside::Closed);
                TunnelEvent::Closed { wire_bytes: 1 }
            }
        };
        self.inputs.push_back(Input::Tunnel(event));
    }

    fn act(&mut self, action: &Action) {
        let Some(condition) = self.process else { return };
        match action {
            Action::Run if self.refuses > 0 => {
                self.refuses -= 1;
                self.tell(Happened::Refused {
                    action: "run",
                    reason: "its monitor is lost".to_owned(),
                });
            }
            Action::Run => {
                assert_ne!(condition, Condition::Loading, "run while its state is loading");
                self.process = Some(Condition::Running);
                self.tell(Happened::Running { at_ms: 1 });
            }
            Action::Stand | Action::Attend | Action::CancelCopy if self.denies > 0 => {
                self.denies -= 1;
                self.tell(Happened::Refused {
                    action: "asking QEMU",
                    reason: "its monitor is lost".to_owned(),
                });
            }
            Action::Stand => {
                self.process = Some(Condition::Standing);
                self.tell(Happened::Standing {
                    at_ms: 1,
                    settled: true,
                });
                self.outside.push(Outside::Stood);
            }
            Action::PowerButton if self.heeds => {
                self.tell(Happened::PoweredOff);
                self.dies();
            }
            Action::Reset => {
                self.resets += 1;
                self.tell(Happened::Reset);
            }
            Action::Kill if self.clings > 0 => {
                self.clings -= 1;
                self.tell(Happened::Refused {
                    action: "kill",
                    reason: "no permission".to_owned(),
                });
            }
            Action::Kill => self.dies(),
            Action::Listen => self.tell(Happened::Listening),
            Action::Copy(_) => self.outside.push(Outside::Copy),
            Action::Attend | Action::CancelCopy => self.outside.push(Outside::CopyCancelled),
            Action::PowerButton | Action::Announce => {}
        }
    }

    pub(crate) fn dies(&mut self) {
        self.process = None;
        self.tell(Happened::Died {
            detail: "ended".to_owned(),
        });
    }

    /// Nothing is left to do: the next timer runs out, if one is set.
    pub(crate) fn timer(&mut self) -> bool {
        match self.timers.pop_first() {
            Some(timer) => {
                self.inputs.push_back(Input::Timer(timer));
                true
            }
            None => false,
        }
    }

    /// Goes on alone until nothing more happens.
    pub(crate) fn settle(&mut self) {
        for _ in 0..200 {
            if !self.turn() && !self.timer() {
                return;
            }
        }
        unreachable!("it does not come to rest");
    }

    pub(crate) fn seen(&self) -> Happening {
        self.task.as_ref().expect("an agent is there").observed().what
    }
}

/// A round that leaves next to nothing.
pub(crate) fn nearly() -> Happened {
    Happened::Copying(CopyState {
        bytes: 1,
        remaining_bytes: 1,
        bytes_per_s: 1 << 30,
        round: 2,
        ended: None,
    })
}

pub(crate) fn copied() -> Happened {
    Happened::Copied {
        cost: CopyCost {
            downtime_ms: 3,
            bytes: 1,
        },
    }
}
