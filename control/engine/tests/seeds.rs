//! Seeded runs: random requests, and agents that answer rightly, late, twice, refuse, die, and come back with another boot. After
//! every step the invariants of `engine::audit` hold, and a follower that applies the changes is the same world.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where its promise is broken"
)]

mod cell;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use cell::{Cell, SHARED, boot, by_name, facts, host, wanted};
use engine::World;
use model::{
    Code, Command, Event, Generation, HostId, Millis, Order, Receipt, Refusal, Report, Revision, Terms, VmId, VmState,
    host::Link,
    order::{Happening, OffCause, PortReport, TemplateReport, Verb, VmObserved, VmOrder, VmReport},
};

const HOSTS: u128 = 3;
const STEPS: usize = 300;

/// xorshift64*: chance from a seed.
struct Chance(u64);

impl Chance {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What a host's journal says of a VM.
#[derive(Clone, Debug, PartialEq)]
enum Part {
    Runs,
    Stands,
    Off(OffCause),
    /// Sends it; how far.
    Source(Terms, Phase, bool),
    /// Receives it.
    Waits(Terms),
    Void,
    TornDown,
    Removed,
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Copies,
    Stopped,
    Released,
}

#[derive(Clone, Debug)]
struct Copy {
    generation: Generation,
    revision: Revision,
    operation: Option<model::OperationId>,
    part: Part,
}

#[derive(Default)]
struct Agent {
    up: bool,
    boots: u128,
    inbox: VecDeque<Order>,
    /// Reports that are not acknowledged, and how many of them were delivered.
    reports: VecDeque<Report>,
    delivered: usize,
    copies: BTreeMap<VmId, Copy>,
}

struct Run {
    cell: Cell,
    chance: Chance,
    agents: BTreeMap<HostId, Agent>,
    /// Generations that have run anywhere.
    ran: BTreeMap<(VmId, Generation), HostId>,
}

impl Run {
    fn new(seed: u64) -> Self {
        let mut run = Self {
            cell: Cell::of(HOSTS),
            chance: Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            agents: (1..=HOSTS).map(|n| (host(n), Agent::default())).collect(),
            ran: BTreeMap::new(),
        };
        for (n, agent) in (1..).zip(run.agents.values_mut()) {
            agent.up = true;
            agent.boots = n;
        }
        run.cell.sent.clear();
        run
    }

    fn any_host(&mut self) -> HostId {
        host(1 + u128::from(self.chance.below(HOSTS as u64)))
    }

    fn step(&mut self) {
        match self.chance.below(40) {
            0..6 => self.request(),
            6..16 => self.take_order(),
            16..28 => self.deliver(),
            28..36 => self.moves(),
            36 => self.mishap(),
            37 => self.link(),
            38 => {
                let seconds = [1, 5, 20, 20, 30, 70, 200, 700][self.chance.below(8) as usize];
                self.cell.tick(seconds);
                let now = self.cell.now;
                assert!(
                    self.cell
                        .world
                        .operations()
                        .all(|op| op.state.is_over() || op.ends_by > now)
                );
            }
            _ => self.cell.tick(0),
        }
        self.route();
        self.check();
    }

    /// Sends what the engine sent to those that are connected.
    fn route(&mut self) {
        for (to, order) in std::mem::take(&mut self.cell.sent) {
            let agent = self.agents.get_mut(&to).unwrap();
            if agent.up {
                agent.inbox.push_back(order);
            }
        }
    }

    fn check(&mut self) {
        // At most one host has each VM in its hands, whatever the world believes.
        let mut holders = BTreeSet::new();
        for agent in self.agents.values() {
            for (vm, copy) in &agent.copies {
                let holds = match &copy.part {
                    Part::Runs | Part::Stands => true,
                    Part::Source(_, phase, alive) => *alive && *phase != Phase::Released,
                    _ => false,
                };
                assert!(!holds || holders.insert(*vm), "two hosts run VM {vm}");
            }
        }
    }

    fn request(&mut self) {
        let vm = format!("vm{}", self.chance.below(5));
        let reference = by_name(&vm);
        let command = match self.chance.below(16) {
            0..4 => {
                let mut create = wanted(&vm);
                create.memory_mib = [64, 512, 1500, 3600][self.chance.below(4) as usize];
                create.vcpus = [1, 2, 8, 16][self.chance.below(4) as usize];
                create.start = !self.chance.one_in(6);
                Command::CreateVm(create)
            }
            4..6 => Command::StartVm(reference),
            6 => {
                let grace = Millis::seconds(10);
                Command::StopVm { vm: reference, grace }
            }
            7 => Command::KillVm(reference),
            8 => Command::RebootVm(reference),
            9 => Command::PauseVm(reference),
            10 => Command::ResumeVm(reference),
            11 => Command::DeleteVm(reference),
            12 => {
                let running: Vec<_> = self.cell.world.operations().filter(|op| !op.state.is_over()).collect();
                match running.first() {
                    Some(operation) => Command::CancelOperation(operation.id),
                    None => return,
                }
            }
            _ => Command::MigrateVm {
                vm: reference,
                to: None,
            },
        };
        let mut request = self.cell.request(command);
        request.dry_run = self.chance.one_in(10);
        let dry = request.dry_run;
        let changes = self.cell.changes;
        let answer = self.cell.submit(request);
        assert!(!dry || self.cell.changes == changes, "a dry run changes nothing");
        if let Err(refusal) = answer {
            assert!(!refusal.message.is_empty() && !refusal.message.contains('\n'));
        }
    }

    fn take_order(&mut self) {
        let at = self.any_host();
        let agent = self.agents.get_mut(&at).unwrap();
        let Some(order) = agent.inbox.pop_front() else { return };
        if self.chance.one_in(12) {
            agent.inbox.push_front(order.clone());
        }
        match order {
            Order::Vm(order) => self.obey(at, *order),
            Order::Template(order) => agent.reports.push_back(Report::Template(TemplateReport {
                operation: order.operation,
                template: order.template,
                pool: order.pool,
                content: None,
                refused: None,
            })),
            Order::Port(order) => agent.reports.push_back(Report::Port(PortReport {
                port: order.port.port,
                revision: order.port.policy.revision,
                refused: None,
            })),
            Order::Lend(_) => {}
            Order::Relay(_) => {}
        }
    }

    fn say(&mut self, at: HostId, vm: VmId, what: Happening) {
        let copy = &self.agents[&at].copies[&vm];
        let report = Report::Vm(Box::new(VmReport {
            vm,
            generation: copy.generation,
            revision: copy.revision,
            operation: copy.operation,
            what,
        }));
        self.agents.get_mut(&at).unwrap().reports.push_back(report);
    }

    /// A host says that it will not, or could not.
    fn refuse(&mut self, at: HostId, order: &VmOrder) {
        let reason = Refusal::new(Code::HostFailed, "it did not work");
        let report = Report::Vm(Box::new(VmReport {
            vm: order.vm,
            generation: order.generation,
            revision: order.revision,
            operation: Some(order.operation),
            what: Happening::Refused { reason },
        }));
        self.agents.get_mut(&at).unwrap().reports.push_back(report);
    }

    /// Whether an order is not carried out: it is an old one, not legal now, or fails.
    fn balks(&mut self, at: HostId, order: &VmOrder, known: Option<&Copy>) -> bool {
        let vm = order.vm;
        if let Some(known) = known {
            if order.revision <= known.revision {
                self.say(at, vm, told(known));
                return true;
            }
            let moving = matches!(known.part, Part::Source(..) | Part::Waits(_));
            // What was not released is the source's to end.
            let ends = matches!(order.verb, Verb::Kill)
                && matches!(&known.part, Part::Source(_, phase, _) if !matches!(phase, Phase::Released));
            if order.generation < known.generation || moving && !ends && !matches!(order.verb, Verb::Cancel { .. }) {
                self.refuse(at, order);
                return true;
            }
        }
        let may = matches!(
            order.verb,
            Verb::Start { .. } | Verb::Receive { .. } | Verb::Pause | Verb::Remove { .. }
        );
        if !(self.chance.one_in(10) && may) {
            return false;
        }
        let part = known.map_or(Part::Removed, |known| match &known.part {
            Part::Off(_) => Part::Off(OffCause::Ordered),
            part => part.clone(),
        });
        let copy = Copy {
            generation: order.generation,
            revision: order.revision,
            operation: Some(order.operation),
            part,
        };
        self.agents.get_mut(&at).unwrap().copies.insert(vm, copy);
        self.refuse(at, order);
        true
    }

    fn obey(&mut self, at: HostId, order: VmOrder) {
        let vm = order.vm;
        let known = self.agents[&at].copies.get(&vm).cloned();
        if self.balks(at, &order, known.as_ref()) {
            return;
        }
        let agent = self.agents.get_mut(&at).unwrap();
        let before = known.map_or(Part::Removed, |known| known.part);
        let mut copy = Copy {
            generation: order.generation,
            revision: order.revision,
            operation: Some(order.operation),
            part: before.clone(),
        };
        let alive = matches!(before, Part::Runs | Part::Stands);
        let off = || Part::Off(OffCause::Ordered);
        let resets = matches!(order.verb, Verb::Reboot);
        copy.part = match (order.verb.clone(), before) {
            (Verb::Start { .. }, _) => {
                let first = self.ran.insert((vm, order.generation), at);
                assert!(first.is_none_or(|first| first == at), "a generation ran on two hosts");
                Part::Runs
            }
            (Verb::Resume | Verb::Reboot, Part::Stands | Part::Runs) => Part::Runs,
            (Verb::Pause, Part::Stands | Part::Runs) => Part::Stands,
            (Verb::Stop { .. } | Verb::Kill, _) => off(),
            (Verb::Remove { .. }, _) => Part::Removed,
            (Verb::Receive { terms, .. }, _) => Part::Waits(terms),
            (Verb::Send { terms, .. }, _) if alive => Part::Source(terms, Phase::Copies, true),
            (Verb::Cancel { terms }, Part::Source(mine, Phase::Released, ..)) if mine.granted == terms.granted => {
                agent.copies.get_mut(&vm).unwrap().revision = order.revision;
                return self.say(at, vm, Happening::TooLate);
            }
            (Verb::Cancel { terms }, Part::Source(mine, _, alive)) if mine.granted == terms.granted => {
                copy.part = if mine.run { Part::Runs } else { Part::Stands };
                agent.copies.insert(vm, copy);
                self.say_kept(at, vm);
                if !alive {
                    self.ends(at, vm, OffCause::HostRebooted);
                }
                return;
            }
            (Verb::Cancel { terms }, Part::Waits(mine)) if mine.granted == terms.granted => Part::Void,
            (Verb::Cancel { .. }, part) => part,
            (_, part) => {
                agent.copies.entry(vm).or_insert(copy).part = part;
                return self.refuse(at, &order);
            }
        };
        let what = if resets { Happening::Rebooted } else { told(&copy) };
        agent.copies.insert(vm, copy);
        self.say(at, vm, what);
    }

    fn say_kept(&mut self, at: HostId, vm: VmId) {
        let reason = Refusal::new(Code::Cancelled, "it was given up");
        self.say(at, vm, Happening::Kept { reason });
    }

    fn ends(&mut self, at: HostId, vm: VmId, cause: OffCause) {
        self.agents.get_mut(&at).unwrap().copies.get_mut(&vm).unwrap().part = Part::Off(cause.clone());
        self.say(at, vm, Happening::Off { cause });
    }

    /// The hand-over between the agents goes on somewhere.
    fn moves(&mut self) {
        let ends: Vec<(HostId, VmId, Part)> = self
            .agents
            .iter()
            .flat_map(|(at, agent)| agent.copies.iter().map(|(vm, copy)| (*at, *vm, copy.part.clone())))
            .filter(|(.., part)| matches!(part, Part::Source(..) | Part::Waits(_)))
            .collect();
        if ends.is_empty() {
            return;
        }
        let (at, vm, part) = ends[self.chance.below(ends.len() as u64) as usize].clone();
        match part {
            Part::Source(terms, phase, alive) => self.source_goes_on(at, vm, terms, phase, alive),
            Part::Waits(terms) => self.destination_goes_on(at, vm, &terms),
            _ => {}
        }
    }

    fn part(&self, at: HostId, vm: VmId, granted: Generation) -> Option<Part> {
        let copy = self.agents[&at].copies.get(&vm)?;
        (copy.generation >= granted || matches!(&copy.part, Part::Source(t, ..) if t.granted == granted))
            .then(|| copy.part.clone())
    }

    fn source_goes_on(&mut self, at: HostId, vm: VmId, terms: Terms, phase: Phase, alive: bool) {
        let other = self.part(terms.destination, vm, terms.granted);
        let gives_up = self.chance.one_in(5);
        let copy = self.agents.get_mut(&at).unwrap().copies.get_mut(&vm).unwrap();
        match (phase, other) {
            (Phase::Copies | Phase::Stopped, _) if gives_up || !alive => {
                copy.part = if terms.run { Part::Runs } else { Part::Stands };
                if alive {
                    self.say_kept(at, vm);
                } else {
                    self.ends(at, vm, OffCause::HostRebooted);
                }
            }
            (Phase::Copies, _) => {
                copy.part = Part::Source(terms, Phase::Stopped, alive);
                self.say(at, vm, Happening::Copying);
                self.say(at, vm, Happening::Stopped);
            }
            (Phase::Stopped, _) => {
                copy.part = Part::Source(terms, Phase::Released, alive);
                self.say(at, vm, Happening::Released);
            }
            (Phase::Released, Some(Part::Void)) if alive => {
                copy.part = if terms.run { Part::Runs } else { Part::Stands };
                copy.generation = terms.reclaimed;
                let reason = "the destination declined".to_owned();
                self.say(at, vm, Happening::Reclaimed { reason });
            }
            (Phase::Released, Some(Part::Void)) => {
                copy.part = Part::Unknown;
                let reason = "it rebooted".to_owned();
                self.say(at, vm, Happening::Unknown { reason });
            }
            (Phase::Released, Some(Part::Waits(_)) | None) => {}
            (Phase::Released, Some(_)) => {
                copy.part = Part::TornDown;
                let receipt = Box::new(Receipt::default());
                let stopped_at_ms = Some(5);
                self.say(at, vm, Happening::TornDown { receipt, stopped_at_ms });
            }
        }
    }

    fn destination_goes_on(&mut self, at: HostId, vm: VmId, terms: &Terms) {
        let source = self.part(terms.source, vm, terms.granted);
        let released = matches!(source, Some(Part::Source(mine, Phase::Released, _)) if mine.granted == terms.granted);
        let declines = self.chance.one_in(if released { 4 } else { 8 });
        let copy = self.agents.get_mut(&at).unwrap().copies.get_mut(&vm).unwrap();
        if declines {
            copy.part = Part::Void;
            let reason = "it took too long".to_owned();
            self.say(at, vm, Happening::Voided { reason });
        } else if released {
            copy.part = if terms.run { Part::Runs } else { Part::Stands };
            let first = self.ran.insert((vm, terms.granted), at);
            assert!(first.is_none_or(|first| first == at), "a generation ran on two hosts");
            self.say(at, vm, Happening::Activated { resumed_at_ms: Some(9) });
        }
    }

    /// A guest or a process ends.
    fn mishap(&mut self) {
        let at = self.any_host();
        let agent = &self.agents[&at];
        let running = agent
            .copies
            .iter()
            .filter(|(_, copy)| matches!(copy.part, Part::Runs))
            .map(|(vm, _)| *vm);
        let Some(vm) = running.take(1).next() else { return };
        let detail = "killed".to_owned();
        let cause = if self.chance.one_in(2) {
            OffCause::Guest
        } else {
            OffCause::Died { detail }
        };
        self.ends(at, vm, cause);
    }

    /// A host loses its connection, comes back, or loses power.
    fn link(&mut self) {
        let at = self.any_host();
        let agent = self.agents.get_mut(&at).unwrap();
        if agent.up {
            agent.up = false;
            agent.inbox.clear();
            self.cell.event(Event::Disconnected(at));
            return;
        }
        if self.chance.one_in(3) {
            agent.boots += 100;
            let copies: Vec<VmId> = agent.copies.keys().copied().collect();
            for vm in copies {
                self.lose_power(at, vm);
            }
        }
        self.reconnect(at);
    }

    fn lose_power(&mut self, at: HostId, vm: VmId) {
        let copy = self.agents.get_mut(&at).unwrap().copies.get_mut(&vm).unwrap();
        match copy.part.clone() {
            Part::Runs | Part::Stands => self.ends(at, vm, OffCause::HostRebooted),
            Part::Source(terms, phase, _) => copy.part = Part::Source(terms, phase, false),
            Part::Waits(_) => {
                copy.part = Part::Void;
                let reason = "it rebooted".to_owned();
                self.say(at, vm, Happening::Voided { reason });
            }
            _ => {}
        }
    }

    fn reconnect(&mut self, at: HostId) {
        let agent = self.agents.get_mut(&at).unwrap();
        agent.up = true;
        agent.delivered = 0;
        let facts = facts(boot(agent.boots), &[(SHARED, "shared")]);
        let unacknowledged: Vec<Report> = agent.reports.drain(..).collect();
        let vms = agent.copies.iter().map(|(vm, copy)| VmObserved {
            vm: *vm,
            generation: copy.generation,
            revision: copy.revision,
            what: told(copy),
        });
        let vms = vms.collect();
        self.cell.event(Event::Connected(at));
        self.cell.report(at, Report::Facts(Box::new(facts)));
        for report in unacknowledged {
            self.cell.report(at, report);
        }
        self.cell.report(at, Report::Inventory { vms });
        self.route();
        let waiting: Vec<Order> = self.cell.world.outbox(at).collect();
        self.agents.get_mut(&at).unwrap().inbox = waiting.into();
    }

    /// The next report of a host arrives; now and then those before it come again.
    fn deliver(&mut self) {
        let at = self.any_host();
        let again = self.chance.one_in(10);
        let acknowledged = self.chance.one_in(3);
        let agent = self.agents.get_mut(&at).unwrap();
        if !agent.up {
            return;
        }
        if acknowledged {
            agent.reports.drain(..agent.delivered);
            agent.delivered = 0;
        } else if again {
            agent.delivered = 0;
        }
        if let Some(report) = agent.reports.get(agent.delivered).cloned() {
            agent.delivered += 1;
            self.cell.report(at, report);
        }
    }

    /// Everything heals, time passes, and nothing is left open.
    fn end(&mut self) {
        for n in 1..=HOSTS {
            if !self.agents[&host(n)].up {
                self.reconnect(host(n));
            }
        }
        for _ in 0..4 {
            self.drain();
            self.cell.tick(2000);
            self.route();
        }
        self.drain();
        self.agrees();
        assert!(
            self.cell.world.operations().all(|op| op.state.is_over()),
            "every operation ends"
        );
        assert!(self.cell.world.hosts().all(|host| host.status.link == Link::Up));
    }
}

impl Run {
    fn drain(&mut self) {
        for _ in 0..150 {
            for _ in 0..4 {
                self.take_order();
                self.deliver();
            }
            self.moves();
            self.route();
            self.check();
        }
    }

    /// With all hosts connected and all told, the world says of each VM what its host does.
    fn agrees(&self) {
        for vm in self.cell.world.vms() {
            let runs = self.agents.iter().find_map(|(at, agent)| {
                let copy = agent.copies.get(&vm.id)?;
                matches!(copy.part, Part::Runs | Part::Stands).then_some((*at, copy))
            });
            let seen = matches!(vm.status.state, VmState::Active | VmState::Paused);
            let parts: Vec<_> = self
                .agents
                .iter()
                .map(|(at, agent)| (*at, agent.copies.get(&vm.id)))
                .collect();
            match runs {
                Some((at, copy)) => assert!(
                    seen && vm.status.host == Some(at) && vm.status.generation == copy.generation,
                    "{} runs on {at}, the world says {:?}; {parts:?}",
                    vm.name,
                    vm.status
                ),
                None => assert!(
                    !seen,
                    "{} runs nowhere, the world says {:?}; {parts:?}",
                    vm.name, vm.status
                ),
            }
            assert!(
                vm.status.state != VmState::Migrating,
                "{} is not settled: {:?}; {parts:?}",
                vm.name,
                vm.status
            );
        }
    }
}

/// How a host tells of a VM.
fn told(copy: &Copy) -> Happening {
    match &copy.part {
        Part::Runs => Happening::Running,
        Part::Stands => Happening::Paused,
        Part::Off(cause) => Happening::Off { cause: cause.clone() },
        Part::Source(_, Phase::Copies, _) => Happening::Copying,
        Part::Source(_, Phase::Stopped, _) => Happening::Stopped,
        Part::Source(_, Phase::Released, _) => Happening::Released,
        Part::Waits(_) => Happening::Receiving { tunnel_port: 9 },
        Part::Void => Happening::Voided {
            reason: "declined".to_owned(),
        },
        Part::TornDown => Happening::TornDown {
            receipt: Box::new(Receipt::default()),
            stopped_at_ms: None,
        },
        Part::Removed => Happening::Removed,
        Part::Unknown => Happening::Unknown {
            reason: "it rebooted".to_owned(),
        },
    }
}

fn run(seed: u64) -> BTreeMap<&'static str, usize> {
    let mut run = Run::new(seed);
    for _ in 0..STEPS {
        run.step();
    }
    run.end();
    assert!(
        run.cell.world == run.cell.follower,
        "a follower that applies the changes is the same world"
    );
    let loaded = World::load(run.cell.world.rows()).unwrap();
    assert!(loaded == run.cell.world, "the rows make the same world");
    for n in 1..=HOSTS {
        assert_eq!(loaded.held(host(n)), run.cell.world.held(host(n)));
    }
    let mut ends = BTreeMap::new();
    for operation in run.cell.world.operations() {
        let moved = operation.migration().is_some();
        let end = match (operation.state.name(), moved) {
            ("succeeded", true) => "moved",
            ("cancelled", true) => "move cancelled",
            (_, true) => "move failed",
            ("succeeded", _) => "succeeded",
            _ => "failed",
        };
        *ends.entry(end).or_default() += 1;
    }
    ends
}

#[test]
fn whatever_hosts_and_people_do_the_invariants_hold() {
    let seeds: u64 = option_env!("GODWIT_SEEDS")
        .and_then(|text| text.parse().ok())
        .unwrap_or(2000);
    let first: u64 = option_env!("GODWIT_SEED")
        .and_then(|text| text.parse().ok())
        .unwrap_or(1);
    let mut all: BTreeMap<&str, usize> = BTreeMap::new();
    for seed in first..first + seeds {
        let ends = std::panic::catch_unwind(|| run(seed));
        let ends = ends.unwrap_or_else(|_| panic!("seed {seed} broke a promise"));
        for (end, count) in ends {
            *all.entry(end).or_default() += count;
        }
    }
    // A run that never comes to a thing shows nothing about it.
    for end in ["moved", "move cancelled", "move failed", "succeeded", "failed"] {
        assert!(
            all.get(end).copied().unwrap_or_default() as u64 > seeds / 50,
            "too few: {all:?}"
        );
    }
}
