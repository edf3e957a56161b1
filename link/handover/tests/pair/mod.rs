//! A pair of hosts around the pure rules: their agents, journals, hypervisors and the wire between, as one transition system.
//!
//! ```text
//!   Pair::choices() ─▶ every next step that can be ──▶ a seed picks one (seeds.rs)
//!                                                 └──▶ all are taken   (exhaustive.rs)
//!   Pair::take(choice) ─▶ the next state, or the promise that was broken
//! ```
//!
//! There is no clock: a timer that is set may run out at any step, a message in flight may come at any step, twice, or never. So each
//! delay and each order of things is one of the paths.

#![allow(dead_code, reason = "each test file uses its part")]

#[path = "../arbiter/mod.rs"]
mod arbiter;
mod hypervisor;
mod side;

use std::{collections::BTreeSet, fmt};

use handover::{Destination, DestinationInput, Receiving, Source, SourceInput};
use model::{BootId, Code, Generation, HostId, Message, Millis, OperationId, Refusal, Terms, VmId};
use uuid::Uuid;

pub(crate) use self::{
    arbiter::{Holder, Words, holder},
    hypervisor::{Asked, Copy, Guest, Told},
    side::Side,
};

/// A fault in the callers, planted to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Planted {
    /// The source lets its guest run when the copy fails after the release.
    ResumeOnLateFailure,
    /// The destination takes the whole state for the release.
    RunWithoutRelease,
    /// A record that was lost with the power is taken for something that never happened.
    LostIsNever,
}

/// Where an agent died, as the design names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum CrashPoint {
    /// Decided, and not in the journal.
    BeforeJournal,
    /// In the journal, and not said.
    JournalledUnsent,
    /// Said, and lost on its way.
    SentNotReceived,
    /// The other side's word was read, and what follows from it is not in the journal.
    ReceivedNotJournalled,
    /// In the journal, and the guest was not let run.
    JournalledNoCont,
}

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum At {
    /// The source.
    A,
    /// The destination.
    B,
}

/// What can happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Choice {
    /// The agent carries out its next effect.
    Work(At),
    /// The agent takes what its hypervisor told first.
    Hear(At),
    /// The hypervisor does what it was asked first.
    Obey(At),
    /// A message comes.
    Deliver(At, Message),
    /// A timer runs out.
    Resend(At),
    /// The destination's wait for the second of the two is over.
    Settle,
    /// The side's own deadline passes.
    Deadline(At),
    /// A restarted agent begins.
    StartAgent(At),
    /// A host without power comes back.
    PowerOn(At),
    /// The source sees that the destination's agent hears it.
    Connect,
    /// The copy goes one step further.
    CopyOn,
    /// Fault: a message comes, and will come again.
    Duplicate(At, Message),
    /// Fault: a message is lost.
    Lose(At, Message),
    /// Fault: kill -9 of the agent.
    KillAgent(At),
    /// Fault: kill -9 of the hypervisor.
    KillGuest(At),
    /// Fault: the host loses power, and so many unsynced records with it.
    PowerOff(At, usize),
    /// Fault: the source sees that the destination's agent does not hear it.
    Disconnect,
    /// Fault: the stream breaks.
    Break,
    /// A person's cancel reaches this side.
    Cancel(At),
}

/// How many faults may still come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Budget {
    /// Messages lost.
    pub(crate) losses: u8,
    /// Messages that come twice.
    pub(crate) duplicates: u8,
    /// Agents killed.
    pub(crate) crashes: u8,
    /// Hosts without power.
    pub(crate) outages: u8,
    /// Hypervisors killed.
    pub(crate) kills: u8,
    /// Streams broken.
    pub(crate) breaks: u8,
    /// Cancels.
    pub(crate) cancels: u8,
    /// Connections between the agents lost.
    pub(crate) cuts: u8,
}

/// What was true once, whatever the journals say now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Truth {
    /// The source journalled its release.
    pub(crate) released: bool,
    /// The source journalled that the VM came back.
    pub(crate) reclaimed: bool,
    /// The destination journalled `Run`.
    pub(crate) run: bool,
    /// The destination journalled `Void`.
    pub(crate) void: bool,
    /// Its guest ran there.
    pub(crate) ran_on_destination: bool,
    /// Whom [`holder`] has named, at any time, by any part of the words.
    pub(crate) named: Option<HostId>,
    /// A hypervisor with the guest's memory, or its host, died.
    pub(crate) may_be_lost: bool,
    /// A host lost power.
    pub(crate) rebooted: bool,
}

/// The pair.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    /// The terms.
    pub(crate) terms: Terms,
    /// The source.
    pub(crate) a: Side<Source>,
    /// The destination.
    pub(crate) b: Side<Destination>,
    /// The stream between the two hypervisors.
    pub(crate) copy: Copy,
    /// Words in flight, to whom.
    pub(crate) wire: BTreeSet<(At, Message)>,
    /// Faults to come.
    pub(crate) budget: Budget,
    /// The ghost.
    pub(crate) truth: Truth,
    /// A fault in the callers.
    pub(crate) planted: Option<Planted>,
    /// Where agents died in this step.
    pub(crate) crashed: Option<(At, CrashPoint)>,
}

/// Ids for tests.
pub(crate) fn id(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

/// Terms for tests: generations 7, 8, 9.
pub(crate) fn terms(run: bool) -> Terms {
    Terms {
        vm: VmId(id(1)),
        operation: OperationId(id(2)),
        source: HostId(id(0xa)),
        source_boot: BootId(id(0xa0)),
        destination: HostId(id(0xb)),
        destination_boot: BootId(id(0xb0)),
        held: Generation(7),
        granted: Generation(8),
        reclaimed: Generation(9),
        run,
        deadline: Millis::seconds(60),
        settle: Millis::seconds(5),
    }
}

/// Any reason: what people read does not steer.
pub(crate) fn why() -> Refusal {
    Refusal::new(Code::HostFailed, "")
}

impl Pair {
    /// A guest runs (or stands, as its user wanted) on the source, a container waits at the destination, the copy begins.
    pub(crate) fn new(run: bool, budget: Budget, planted: Option<Planted>) -> Self {
        let terms = terms(run);
        let guest = if run { Guest::Running } else { Guest::Standing };
        // Connected as if by itself: each order of that, too, is another history, and a cut makes them all.
        let mut source = Source::begin();
        source.step(SourceInput::PeerConnected);
        Self {
            a: Side::new(source, terms.source_boot, guest),
            b: Side::new(Destination::begin(), terms.destination_boot, Guest::Loading),
            terms,
            copy: Copy::default(),
            wire: BTreeSet::new(),
            budget,
            truth: Truth::default(),
            planted,
            crashed: None,
        }
    }

    /// All that can happen now; faults last, as far as the budget goes.
    pub(crate) fn choices(&self) -> Vec<Choice> {
        let mut choices = vec![];
        self.a.choices(At::A, &mut choices);
        self.b.choices(At::B, &mut choices);
        if self.b.timers.settle && self.b.idle() {
            choices.push(Choice::Settle);
        }
        for &(to, message) in &self.wire {
            let takes = match to {
                At::A => self.a.idle(),
                At::B => self.b.idle(),
            };
            if takes {
                choices.push(Choice::Deliver(to, message));
            }
        }
        let (connected, can_say) = self.connection();
        if can_say && !connected && self.b.agent_up() {
            choices.push(Choice::Connect);
        }
        if self.budget.cuts > 0 && can_say && connected {
            choices.push(Choice::Disconnect);
        }
        if self.copy.can_go_on(self.a.guest, self.b.guest) {
            choices.push(Choice::CopyOn);
        }
        self.faults(&mut choices);
        choices
    }

    /// Whether the source sees the destination's agent, and whether it cares and takes inputs.
    fn connection(&self) -> (bool, bool) {
        match self.a.state() {
            Some(Source::Copying { connected, .. }) => (*connected, self.a.idle()),
            _ => (false, false),
        }
    }

    fn faults(&self, choices: &mut Vec<Choice>) {
        let budget = self.budget;
        for &(to, message) in &self.wire {
            if budget.losses > 0 {
                choices.push(Choice::Lose(to, message));
            }
            let takes = match to {
                At::A => self.a.idle(),
                At::B => self.b.idle(),
            };
            if budget.duplicates > 0 && takes {
                choices.push(Choice::Duplicate(to, message));
            }
        }
        let sides = [
            (
                At::A,
                self.a.on,
                self.a.agent_up(),
                self.a.guest,
                self.a.journal.len(),
                self.a.idle(),
            ),
            (
                At::B,
                self.b.on,
                self.b.agent_up(),
                self.b.guest,
                self.b.journal.len(),
                self.b.idle(),
            ),
        ];
        for (at, on, agent, guest, records, idle) in sides {
            if budget.crashes > 0 && agent {
                choices.push(Choice::KillAgent(at));
            }
            if budget.kills > 0 && guest != Guest::Dead {
                choices.push(Choice::KillGuest(at));
            }
            if budget.outages > 0 && on {
                choices.extend((0..=records).map(|lost| Choice::PowerOff(at, lost)));
            }
            if budget.cancels > 0 && idle {
                choices.push(Choice::Cancel(at));
            }
        }
        if budget.breaks > 0 && self.copy.is_open() {
            choices.push(Choice::Break);
        }
    }

    /// Does one step and checks every promise.
    pub(crate) fn take(&mut self, choice: Choice) -> Result<(), String> {
        self.crashed = None;
        match choice {
            Choice::Work(at) => self.work(at)?,
            Choice::Hear(at) => self.hear(at),
            Choice::Obey(at) => self.obey(at),
            Choice::Deliver(at, message) => {
                self.wire.remove(&(at, message));
                self.word(at, message);
            }
            Choice::Duplicate(at, message) => {
                self.budget.duplicates -= 1;
                self.word(at, message);
            }
            Choice::Lose(at, message) => {
                self.budget.losses -= 1;
                self.wire.remove(&(at, message));
            }
            Choice::Resend(At::A) => {
                self.a.timers.resend = false;
                self.source(SourceInput::Resend);
            }
            Choice::Resend(At::B) => {
                self.b.timers.resend = false;
                self.destination(DestinationInput::Resend);
            }
            Choice::Settle => {
                self.b.timers.settle = false;
                self.give_up(At::B);
            }
            Choice::Deadline(At::A) => {
                self.a.timers.deadline = false;
                self.give_up(At::A);
            }
            Choice::Deadline(At::B) => {
                self.b.timers.deadline = false;
                self.give_up(At::B);
            }
            Choice::Connect => self.source(SourceInput::PeerConnected),
            Choice::Disconnect => {
                self.budget.cuts -= 1;
                self.source(SourceInput::PeerLost);
            }
            Choice::Cancel(at) => {
                self.budget.cancels -= 1;
                self.give_up(at);
            }
            Choice::CopyOn => self.copy_on(),
            Choice::Break => {
                self.budget.breaks -= 1;
                self.break_stream();
            }
            Choice::StartAgent(At::A) => self.start_source(),
            Choice::StartAgent(At::B) => self.start_destination(),
            Choice::PowerOn(At::A) => self.a.power_on(),
            Choice::PowerOn(At::B) => self.b.power_on(),
            Choice::KillAgent(at) => self.kill_agent(at),
            Choice::KillGuest(at) => {
                self.budget.kills -= 1;
                self.truth.may_be_lost = true;
                self.end_guest(at);
            }
            Choice::PowerOff(at, lost) => self.power_off(at, lost),
        }
        self.check()
    }

    fn power_off(&mut self, at: At, lost: usize) {
        self.budget.outages -= 1;
        self.truth.may_be_lost = true;
        self.truth.rebooted = true;
        match at {
            At::A => self.a.power_off(lost),
            At::B => self.b.power_off(lost),
        }
        self.break_stream();
    }

    fn kill_agent(&mut self, at: At) {
        self.budget.crashes -= 1;
        let (point, lose) = match at {
            At::A => (self.a.crash_point(), (At::B, self.a.last_said())),
            At::B => (self.b.crash_point(), (At::A, self.b.last_said())),
        };
        self.crashed = point.map(|point| (at, point));
        if point == Some(CrashPoint::SentNotReceived)
            && let (to, Some(message)) = lose
        {
            self.wire.remove(&(to, message));
        }
        match at {
            At::A => self.a.kill_agent(),
            At::B => self.b.kill_agent(),
        }
    }

    fn word(&mut self, at: At, message: Message) {
        match at {
            At::A => self.source(SourceInput::Heard(message)),
            At::B => self.destination(DestinationInput::Heard(message)),
        }
    }

    fn give_up(&mut self, at: At) {
        match at {
            At::A => self.source(SourceInput::GiveUp { reason: why() }),
            At::B => self.destination(DestinationInput::GiveUp { reason: String::new() }),
        }
    }

    /// Every promise that holds at each instant.
    fn check(&mut self) -> Result<(), String> {
        let (a_runs, b_runs) = (self.a.guest == Guest::Running, self.b.guest == Guest::Running);
        if a_runs && b_runs {
            return Err("two guests run".to_owned());
        }
        if a_runs && !self.a.journal.last().is_some_and(Source::may_run) {
            return Err(format!(
                "the source runs the guest, and its journal says {:?}",
                self.a.journal.last()
            ));
        }
        if a_runs && self.truth.released && !self.truth.reclaimed {
            return Err("the source runs the guest after its release".to_owned());
        }
        if a_runs && self.truth.ran_on_destination {
            return Err("the source runs the guest after the destination ran it".to_owned());
        }
        if b_runs && !self.b.journal.last().is_some_and(Destination::may_run) {
            return Err(format!(
                "the destination runs the guest, and its journal says {:?}",
                self.b.journal.last()
            ));
        }
        if b_runs && !self.truth.released {
            return Err("the destination runs the guest without the release".to_owned());
        }
        self.truth.ran_on_destination |= b_runs;
        if self.truth.run && self.truth.void {
            return Err("the destination journalled both Run and Void".to_owned());
        }
        if self.truth.reclaimed && !self.truth.void {
            return Err("the source took the VM back without the destination's Void".to_owned());
        }
        self.check_holder()
    }

    /// What the controller makes of any part of the words, now or later, never names two hosts, nor one that others run.
    fn check_holder(&mut self) -> Result<(), String> {
        let (source, destination) = (self.a.word(), self.b.word());
        let named = [(true, false), (false, true), (true, true)].map(|(of_source, of_destination)| {
            let words = Words {
                source: source.filter(|_| of_source),
                destination: destination.filter(|_| of_destination),
            };
            holder(&self.terms, words)
        });
        for named in named {
            match named {
                Holder::Host(host, generation) => self.check_named(host, generation)?,
                Holder::Unknown if !self.truth.rebooted => {
                    return Err("the holder is unknown, and no host was ever without power".to_owned());
                }
                Holder::Unknown | Holder::Undecided => {}
            }
        }
        Ok(())
    }

    fn check_named(&mut self, host: HostId, generation: Generation) -> Result<(), String> {
        if *self.truth.named.get_or_insert(host) != host {
            return Err(format!(
                "two hosts were named holder: {:?} and {host}",
                self.truth.named
            ));
        }
        let source = host == self.terms.source;
        let other_runs = match source {
            true => self.b.guest == Guest::Running || self.truth.run,
            false => self.a.guest == Guest::Running || self.truth.void,
        };
        if other_runs {
            return Err(format!("{host} is named holder, and the other one has the VM"));
        }
        if source && self.truth.released && generation != self.terms.reclaimed {
            return Err(format!(
                "the source is named holder under {generation}, which it had given up"
            ));
        }
        Ok(())
    }

    /// Goes on without faults, fairly, until nothing more happens.
    pub(crate) fn heal(&mut self) -> Result<(), String> {
        self.budget = Budget {
            losses: 0,
            duplicates: 0,
            crashes: 0,
            outages: 0,
            kills: 0,
            breaks: 0,
            cancels: 0,
            cuts: 0,
        };
        for turn in 0..2_000 {
            // A timer runs out only when nothing else is left to do, and each gets its turn.
            let choices = self.choices();
            let (timers, steps): (Vec<_>, Vec<_>) = choices
                .into_iter()
                .partition(|choice| matches!(choice, Choice::Resend(_) | Choice::Settle | Choice::Deadline(_)));
            let timers: Vec<_> = timers.into_iter().filter(|&choice| self.is_useful(choice)).collect();
            let next = steps.first().or_else(|| timers.get(turn % timers.len().max(1)));
            let Some(&next) = next else { return self.check_end() };
            self.take(next)?;
        }
        Err("it does not come to an end".to_owned())
    }

    /// A word that nobody will ever answer may be repeated for ever: see [`Pair::check_end`].
    fn is_useful(&self, timer: Choice) -> bool {
        let (Choice::Resend(at), Some(a), Some(b)) = (timer, self.a.state(), self.b.state()) else {
            return true;
        };
        let deaf = *a == Source::Unknown || *b == Destination::Unknown;
        let over = a.is_over() && b.is_over();
        // A destination that asks a source with nothing to say is ended by its own deadline.
        let answered = at == At::A || *a == Source::Released;
        answered && !deaf && !over
    }

    /// Somebody runs it, or has it in the state that its user wanted; or its memory is lost and both know; or it is unknown, by the rules.
    fn check_end(&self) -> Result<(), String> {
        let (Some(a), Some(b)) = (self.a.state(), self.b.state()) else {
            return Err("an agent is not there at the end".to_owned());
        };
        let wanted = if self.terms.run {
            Guest::Running
        } else {
            Guest::Standing
        };
        let bad = |what: &str| {
            Err(format!(
                "{what} at the end: source {a:?} {:?}, destination {b:?} {:?}",
                self.a.guest, self.b.guest
            ))
        };
        if self.a.guest == wanted && a.may_run() && a.is_over() {
            return match (b, self.b.guest) {
                (Destination::Void { .. } | Destination::Unknown, Guest::Dead) => Ok(()),
                _ => bad("something is left at the destination"),
            };
        }
        if self.b.guest == wanted && b.may_run() {
            return match (a, self.a.guest) {
                (Source::HandedOver | Source::Unknown, Guest::Dead) => Ok(()),
                _ => bad("something is left at the source"),
            };
        }
        if !self.truth.may_be_lost {
            return bad("nobody has the guest, and nothing died,");
        }
        let words = Words {
            source: Some(a),
            destination: Some(b),
        };
        match holder(&self.terms, words) {
            Holder::Host(..) if b.is_over() && a.is_over() => Ok(()),
            Holder::Unknown if self.truth.rebooted => Ok(()),
            _ => bad("memory is lost and not both sides know"),
        }
    }

    /// Writes a text that is equal for states that go on alike.
    pub(crate) fn describe(&self, to: &mut dyn fmt::Write) -> fmt::Result {
        write!(
            to,
            "{:?}{:?}{:?}{:?}{:?}",
            self.a, self.b, self.copy, self.wire, self.budget
        )?;
        let truth = &self.truth;
        let source_named = truth.named.map(|host| host == self.terms.source);
        let flags = [
            truth.released,
            truth.reclaimed,
            truth.run,
            truth.void,
            truth.ran_on_destination,
        ];
        write!(to, "{flags:?}{source_named:?}{}{}", truth.may_be_lost, truth.rebooted)
    }

    /// Whether the state has all: for the planted fault.
    fn planted_release(&mut self) {
        let complete = Receiving {
            complete: true,
            released: false,
        };
        if self.planted == Some(Planted::RunWithoutRelease) && self.b.state() == Some(&Destination::Waiting(complete)) {
            self.destination(DestinationInput::Heard(Message::Release));
        }
    }
}
