//! The simulator: the production engine and tasks under a simulated clock, network, hypervisor and disk, with faults of all kinds.
//!
//! ```text
//!   seed ─▶ commands, faults ─┐
//!                             ▼                      ┌─ Host: journal, one Task a VM ─ Process (QEMU) ┐
//!        heap of events ─▶ Sim::step ─▶ engine ⇄ link ┤                                               ├ copy, words
//!                             ▲                      └─ Host: journal, one Task a VM ─ Process (QEMU) ┘
//!                             └──────────── what all of them lead to, later ◀────────────────────────┘
//! ```
//!
//! Invariants:
//! - A seed is one history, always: time is a number, chance comes from one generator, maps are sorted.
//! - Nothing of the decisions is here: `engine`, `task` and `handover` are those of production. What is here is what they run on.
//! - What must never be is looked for at every step; what must come about, at the end, when faults have stopped and time has passed.

mod agent;
mod audit;
mod chance;
mod controller;
mod copy;
mod faults;
mod people;
mod process;

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash, Hasher},
};

use driver::Action;
use engine::World;
use model::{
    Generation, HostId, Key, Order, Report, Row, VmId, VolumeId,
    order::{Relay, VolumePlace},
};
use task::{Input, Timer};

use crate::{agent::Host, chance::Chance, copy::Copy, process::Process};

/// What one seed led to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The promise that was broken, if one was.
    pub broken: Option<String>,
    /// Hash of all that happened, in order.
    pub hash: u64,
    /// Events.
    pub events: u64,
    /// Moves that arrived.
    pub moved: u64,
    /// Moves that were rolled back, or cancelled.
    pub rolled_back: u64,
    /// Other operations that succeeded.
    pub succeeded: u64,
    /// Other operations that did not.
    pub failed: u64,
    /// Faults that were done, by name.
    pub faults: BTreeMap<&'static str, u64>,
    /// What happened, a line each, when it was asked for.
    pub trace: Vec<String>,
}

/// How much may go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Hosts.
    pub hosts: usize,
    /// How long people ask and faults come, ms of simulated time.
    pub chaos_ms: u64,
    /// Whether faults come at all.
    pub faults: bool,
    /// Keep a line of text for each thing that happens.
    pub trace: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hosts: 3,
            chaos_ms: 60_000,
            faults: true,
            trace: false,
        }
    }
}

/// What is going to happen.
#[derive(Clone, Debug)]
pub(crate) enum Happens {
    /// An agent's task is told something; lost when the agent died meanwhile.
    Input {
        host: usize,
        agent: u64,
        vm: VmId,
        input: Box<Input>,
    },
    Timer {
        host: usize,
        agent: u64,
        vm: VmId,
        timer: Timer,
        stamp: u64,
    },
    /// A process does what it was asked.
    Act {
        process: u64,
        action: Action,
    },
    /// A guest powers itself off, after a button or by itself.
    PowersOff {
        process: u64,
    },
    /// A process ends.
    Ends {
        process: u64,
        why: &'static str,
    },
    /// A copy goes on.
    CopyOn {
        copy: u64,
    },
    /// A tunnel that nobody uses ends itself.
    TunnelEnds {
        host: usize,
        vm: VmId,
        granted: Generation,
        serial: u64,
    },
    /// The source's tunnel reaches the destination's, or does not.
    Dialled {
        host: usize,
        vm: VmId,
        granted: Generation,
        to: usize,
    },
    /// Files are deleted.
    Deleted {
        host: usize,
        agent: u64,
        vm: VmId,
        volumes: Vec<VolumePlace>,
    },
    /// A word from agent to agent.
    Word {
        to: usize,
        word: Relay,
    },
    Down {
        host: usize,
        session: u64,
        order: Box<Order>,
    },
    Up {
        host: usize,
        session: u64,
        number: u64,
        report: Box<Report>,
    },
    Ack {
        host: usize,
        session: u64,
        number: u64,
    },
    Connects {
        host: usize,
    },
    AgentStarts {
        host: usize,
    },
    PowerOn {
        host: usize,
    },
    ControllerStarts,
    Tick,
    /// A person asks for something.
    Asks,
    /// Something breaks.
    Breaks,
    /// A cut between two hosts, or between a host and the controller, is over.
    Heals {
        a: usize,
        b: Option<usize>,
    },
}

/// The whole: controller, hosts, and what lies between.
pub struct Sim {
    options: Options,
    chance: Chance,
    now: u64,
    sequence: u64,
    ids: u128,
    heap: BTreeMap<(u64, u64), Happens>,
    world: Option<World>,
    rows: BTreeMap<Key, Row>,
    epoch: u64,
    generations: BTreeMap<VmId, (Generation, Option<HostId>)>,
    received: BTreeMap<usize, (u64, u64)>,
    hosts: Vec<Host>,
    processes: BTreeMap<u64, Process>,
    copies: BTreeMap<u64, Copy>,
    disks: BTreeSet<VolumeId>,
    cuts: BTreeSet<(usize, usize)>,
    calm: bool,
    hasher: DefaultHasher,
    outcome: Outcome,
}

/// Runs one seed to its end.
#[must_use]
pub fn run(seed: u64, options: Options) -> Outcome {
    let mut sim = Sim::new(seed, options);
    if let Err(broken) = sim.play() {
        sim.outcome.broken = Some(broken);
    }
    sim.outcome.hash = sim.hasher.finish();
    sim.outcome
}

/// The end of a step: what was broken, if anything.
pub(crate) type Checked = Result<(), String>;

impl Sim {
    fn new(seed: u64, options: Options) -> Self {
        let mut sim = Self {
            options,
            chance: Chance::new(seed),
            now: 0,
            sequence: 0,
            ids: 0x1000,
            heap: BTreeMap::new(),
            world: None,
            rows: BTreeMap::new(),
            epoch: 0,
            generations: BTreeMap::new(),
            received: BTreeMap::new(),
            hosts: (0..options.hosts).map(Host::new).collect(),
            processes: BTreeMap::new(),
            copies: BTreeMap::new(),
            disks: BTreeSet::new(),
            cuts: BTreeSet::new(),
            calm: true,
            hasher: DefaultHasher::new(),
            outcome: Outcome::default(),
        };
        sim.found();
        sim
    }

    fn play(&mut self) -> Checked {
        self.begin()?;
        self.run_until(2_000)?;
        self.calm = false;
        self.after(0, 500, Happens::Asks);
        if self.options.faults {
            self.after(0, 5_000, Happens::Breaks);
        }
        self.run_until(2_000 + self.options.chaos_ms)?;
        self.calm = true;
        self.heal()?;
        // Longer than any operation may take.
        self.run_until(self.now + 1_000_000)?;
        self.check_end()
    }

    fn run_until(&mut self, end: u64) -> Checked {
        while let Some((&(at, sequence), _)) = self.heap.first_key_value() {
            if at > end {
                break;
            }
            let (_, next) = self.heap.pop_first().expect("the first was seen");
            self.now = at;
            self.outcome.events += 1;
            (at, sequence, std::mem::discriminant(&next)).hash(&mut self.hasher);
            self.take(next)?;
        }
        self.now = end;
        Ok(())
    }

    fn take(&mut self, next: Happens) -> Checked {
        if self.options.trace && !matches!(next, Happens::Tick) {
            self.note(|| format!("{next:?}"));
        }
        match next {
            Happens::Input { host, agent, vm, input } => self.input(host, agent, vm, *input),
            Happens::Timer {
                host,
                agent,
                vm,
                timer,
                stamp,
            } => self.timer(host, agent, vm, timer, stamp),
            Happens::Act { process, action } => self.act(process, &action),
            Happens::PowersOff { process } => self.powers_off(process),
            Happens::Ends { process, why } => self.ends(process, why),
            Happens::CopyOn { copy } => self.copy_on(copy),
            Happens::TunnelEnds {
                host,
                vm,
                granted,
                serial,
            } => self.tunnel_ends(host, vm, granted, serial),
            Happens::Dialled { host, vm, granted, to } => self.dialled(host, vm, granted, to),
            Happens::Deleted {
                host,
                agent,
                vm,
                volumes,
            } => self.deleted(host, agent, vm, &volumes),
            Happens::Word { to, word } => self.word(to, word),
            Happens::Down { host, session, order } => self.down(host, session, *order),
            Happens::Up {
                host,
                session,
                number,
                report,
            } => self.up(host, session, number, *report),
            Happens::Ack { host, session, number } => self.ack(host, session, number),
            Happens::Connects { host } => self.connects(host),
            Happens::AgentStarts { host } => self.agent_starts(host),
            Happens::PowerOn { host } => self.power_on(host),
            Happens::ControllerStarts => self.controller_starts(),
            Happens::Tick => self.tick(),
            Happens::Asks => self.asks(),
            Happens::Breaks => self.breaks(),
            Happens::Heals { a, b } => self.heals(a, b),
        }
    }

    /// Something happens between `least` and `most` ms from now.
    fn after(&mut self, least: u64, most: u64, what: Happens) {
        let delay = self.chance.between(least, most);
        self.at(self.now + delay, what);
    }

    fn at(&mut self, at: u64, what: Happens) {
        self.sequence += 1;
        self.heap.insert((at, self.sequence), what);
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if self.options.trace {
            let now = self.now;
            self.outcome.trace.push(format!("{now:>8} {}", line()));
        }
    }

    /// A number that was never given before.
    fn fresh(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }
}
