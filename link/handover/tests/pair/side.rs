//! One side: its agent with what it has still to do, its journal, its timers; and how the effects of the rules are carried out.

use std::collections::VecDeque;

use handover::{Destination, DestinationEffect, DestinationInput, Source, SourceEffect, SourceInput};
use model::{BootId, Message};

use super::{Asked, At, Choice, CrashPoint, Guest, Pair, Planted, Told, id, why};

/// An effect, of either side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Write the state to the journal.
    Journal,
    /// Ask the hypervisor for this.
    Ask(Asked),
    /// Let the guest run, if it is to run.
    Cont,
    /// Say this to the other side.
    Say(Message),
    /// Set the destination's wait for the second of the two.
    AllowSettle,
    /// Only people are told.
    Nothing,
}

/// Which timers are set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Timers {
    pub(crate) resend: bool,
    pub(crate) settle: bool,
    pub(crate) deadline: bool,
}

/// The living agent.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Agent<S> {
    state: S,
    /// What it has still to do before it takes the next input.
    queue: VecDeque<Work>,
    /// What it did last, of the same input.
    did: Option<Work>,
    /// The input was the other side's word.
    word: bool,
}

/// One side.
#[derive(Clone, Debug)]
pub(crate) struct Side<S> {
    /// The host has power.
    pub(crate) on: bool,
    boot: BootId,
    agent: Option<Agent<S>>,
    /// What is written; a loss of power may take any number of the last ones.
    pub(crate) journal: Vec<S>,
    /// What its hypervisor does.
    pub(crate) guest: Guest,
    /// What the agent asked of the hypervisor; it outlives the agent.
    pub(crate) asked: VecDeque<Asked>,
    /// What the hypervisor told; it goes with the agent.
    pub(crate) told: VecDeque<Told>,
    pub(crate) timers: Timers,
}

impl<S: Clone + std::fmt::Debug> Side<S> {
    pub(crate) fn new(state: S, boot: BootId, guest: Guest) -> Self {
        Self {
            on: true,
            boot,
            agent: Some(Agent {
                state: state.clone(),
                queue: VecDeque::new(),
                did: None,
                word: false,
            }),
            journal: vec![state],
            guest,
            asked: VecDeque::new(),
            told: VecDeque::new(),
            timers: Timers {
                deadline: true,
                ..Timers::default()
            },
        }
    }

    pub(crate) fn agent_up(&self) -> bool {
        self.agent.is_some()
    }

    /// The agent is there and takes inputs.
    pub(crate) fn idle(&self) -> bool {
        self.agent.as_ref().is_some_and(|agent| agent.queue.is_empty())
    }

    pub(crate) fn state(&self) -> Option<&S> {
        self.agent.as_ref().map(|agent| &agent.state)
    }

    /// What it says of itself to the controller: only what is in its journal, and nothing before it looked.
    pub(crate) fn word(&self) -> Option<&S> {
        self.agent
            .as_ref()
            .filter(|agent| agent.queue.is_empty())
            .map(|agent| &agent.state)
    }

    pub(crate) fn choices(&self, at: At, choices: &mut Vec<Choice>) {
        if !self.on {
            choices.push(Choice::PowerOn(at));
            return;
        }
        let Some(agent) = &self.agent else {
            choices.push(Choice::StartAgent(at));
            if !self.asked.is_empty() {
                choices.push(Choice::Obey(at));
            }
            return;
        };
        if !agent.queue.is_empty() {
            choices.push(Choice::Work(at));
        } else {
            if !self.told.is_empty() {
                choices.push(Choice::Hear(at));
            }
            if self.timers.resend {
                choices.push(Choice::Resend(at));
            }
            if self.timers.deadline {
                choices.push(Choice::Deadline(at));
            }
        }
        if !self.asked.is_empty() {
            choices.push(Choice::Obey(at));
        }
    }

    pub(crate) fn tell(&mut self, told: Told) {
        if self.agent.is_some() {
            self.told.push_back(told);
        }
    }

    /// Where the agent would die now, as the design names it.
    pub(crate) fn crash_point(&self) -> Option<CrashPoint> {
        let agent = self.agent.as_ref()?;
        let rest = |work: fn(&Work) -> bool| agent.queue.iter().any(work);
        let journalled = agent.did.is_some() && !rest(|work| *work == Work::Journal);
        match &agent.did {
            _ if rest(|work| *work == Work::Journal) && agent.word => Some(CrashPoint::ReceivedNotJournalled),
            _ if rest(|work| *work == Work::Journal) => Some(CrashPoint::BeforeJournal),
            Some(_) if journalled && rest(|work| *work == Work::Cont) => Some(CrashPoint::JournalledNoCont),
            Some(_) if journalled && rest(|work| matches!(work, Work::Say(_))) => Some(CrashPoint::JournalledUnsent),
            Some(Work::Say(_)) => Some(CrashPoint::SentNotReceived),
            _ => None,
        }
    }

    pub(crate) fn last_said(&self) -> Option<Message> {
        match self.agent.as_ref()?.did {
            Some(Work::Say(message)) => Some(message),
            _ => None,
        }
    }

    pub(crate) fn kill_agent(&mut self) {
        self.agent = None;
        self.told.clear();
        self.timers = Timers::default();
    }

    pub(crate) fn power_off(&mut self, lost: usize) {
        self.kill_agent();
        self.on = false;
        self.asked.clear();
        self.guest = Guest::Dead;
        self.journal.truncate(self.journal.len() - lost);
        // One id is as good as another, so long as it is not the first.
        self.boot = BootId(id(0xff));
    }

    pub(crate) fn power_on(&mut self) {
        self.on = true;
    }

    fn begin(&mut self, state: S, work: Vec<Work>, word: bool) {
        self.agent = Some(Agent {
            state,
            queue: work.into(),
            did: None,
            word,
        });
    }

    fn next(&mut self) -> Option<Work> {
        let agent = self.agent.as_mut()?;
        let work = agent.queue.pop_front()?;
        agent.did = Some(work.clone());
        Some(work)
    }
}

impl Pair {
    /// Carries the next effect out.
    pub(crate) fn work(&mut self, at: At) -> Result<(), String> {
        let work = match at {
            At::A => self.a.next(),
            At::B => self.b.next(),
        };
        match work.ok_or("nothing to do")? {
            Work::Journal => self.journal(at)?,
            Work::Ask(asked) => self.ask(at, asked),
            Work::Cont if self.terms.run => self.ask(at, Asked::Cont),
            Work::Cont | Work::Nothing => {}
            Work::Say(message) => {
                let to = if at == At::A { At::B } else { At::A };
                self.wire.insert((to, message));
                match at {
                    At::A => self.a.timers.resend = true,
                    At::B => self.b.timers.resend |= message == Message::Ask,
                }
            }
            Work::AllowSettle => self.b.timers.settle = true,
        }
        Ok(())
    }

    fn ask(&mut self, at: At, asked: Asked) {
        match at {
            At::A => self.a.asked.push_back(asked),
            At::B => self.b.asked.push_back(asked),
        }
    }

    fn journal(&mut self, at: At) -> Result<(), String> {
        match at {
            At::A => {
                let state = self.a.state().cloned().ok_or("no agent")?;
                self.truth.released |= state == Source::Released;
                self.truth.reclaimed |= state == Source::Reclaimed;
                self.a.journal.push(state);
            }
            At::B => {
                let state = self.b.state().cloned().ok_or("no agent")?;
                self.truth.run |= state == Destination::Run;
                self.truth.void |= matches!(state, Destination::Void { .. });
                if self.b.guest != Guest::Dead && matches!(state, Destination::Void { .. }) {
                    return Err("the destination journalled Void and its process lives".to_owned());
                }
                self.b.journal.push(state);
            }
        }
        Ok(())
    }

    /// Feeds the source's rules.
    pub(crate) fn source(&mut self, input: SourceInput) {
        let Some(agent) = &mut self.a.agent else { return };
        let late = agent.state == Source::Released && matches!(input, SourceInput::CopyFailed { .. });
        agent.word = matches!(input, SourceInput::Heard(_));
        agent.did = None;
        let effects = agent.state.step(input);
        agent.queue.extend(effects.into_iter().map(of_source));
        if late && self.planted == Some(Planted::ResumeOnLateFailure) {
            agent.queue.push_back(Work::Cont);
        }
        if agent.state.is_over() {
            self.a.timers = Timers::default();
        }
    }

    /// Feeds the destination's rules.
    pub(crate) fn destination(&mut self, input: DestinationInput) {
        let Some(agent) = &mut self.b.agent else { return };
        agent.word = matches!(input, DestinationInput::Heard(_));
        agent.did = None;
        let effects = agent.state.step(input);
        agent.queue.extend(effects.into_iter().map(of_destination));
        if agent.state.is_over() {
            self.b.timers = Timers::default();
        }
        self.planted_release();
    }

    /// The source's agent begins again: its journal, then its hypervisor, then on.
    pub(crate) fn start_source(&mut self) {
        let boot = match self.planted {
            Some(Planted::LostIsNever) => self.terms.source_boot,
            _ => self.a.boot,
        };
        let mut state = Source::recover(&self.terms, self.a.journal.last().cloned(), boot);
        state.step(SourceInput::PeerConnected);
        let alive = self.a.guest != Guest::Dead;
        let copying = matches!(state, Source::Copying { .. });
        let first = match &state {
            Source::HandedOver if alive => vec![Work::Ask(Asked::Kill)],
            Source::Kept { .. } | Source::Reclaimed if alive => vec![Work::Cont],
            _ => vec![],
        };
        let released = state == Source::Released;
        self.a.begin(state, first, false);
        // What a dead agent asked still reaches the hypervisor first.
        if copying && alive {
            self.a.timers.deadline = true;
            self.ask(At::A, Asked::Attend);
        } else if copying {
            self.source(SourceInput::Died { reason: why() });
        } else if released {
            self.source(SourceInput::Resend);
        }
    }

    /// The destination's agent begins again.
    pub(crate) fn start_destination(&mut self) {
        let boot = match self.planted {
            Some(Planted::LostIsNever) => self.terms.destination_boot,
            _ => self.b.boot,
        };
        let saved = self.b.journal.last().cloned();
        let saved = match self.planted {
            Some(Planted::LostIsNever) => saved.or(Some(Destination::begin())),
            _ => saved,
        };
        let alive = self.b.guest != Guest::Dead;
        let recovered = Destination::recover(&self.terms, saved, boot, alive);
        let work = recovered.effects.into_iter().map(of_destination).collect();
        let waits = matches!(recovered.state, Destination::Waiting(_));
        self.b.begin(recovered.state, work, false);
        self.b.timers.deadline = waits;
        if waits && self.b.guest == Guest::Standing {
            self.destination(DestinationInput::Complete);
        }
    }

    /// The agent takes what its hypervisor told first.
    pub(crate) fn hear(&mut self, at: At) {
        match at {
            At::A => match self.a.told.pop_front() {
                Some(Told::NearlyDone) => self.source(SourceInput::NearlyDone),
                Some(Told::Stood { settled }) => self.source(SourceInput::Stood { settled }),
                Some(Told::Copied) => self.source(SourceInput::Copied),
                Some(Told::CopyFailed) => self.source(SourceInput::CopyFailed { reason: why() }),
                Some(Told::Died) => self.source(SourceInput::Died { reason: why() }),
                Some(Told::Loaded | Told::LoadFailed) | None => {}
            },
            At::B => match self.b.told.pop_front() {
                Some(Told::Loaded) => self.destination(DestinationInput::Complete),
                Some(Told::LoadFailed) => self.destination(DestinationInput::GiveUp { reason: String::new() }),
                Some(Told::Died) => self.destination(DestinationInput::Died { reason: String::new() }),
                _ => {}
            },
        }
    }
}

fn of_source(effect: SourceEffect) -> Work {
    match effect {
        SourceEffect::Journal => Work::Journal,
        SourceEffect::Stand => Work::Ask(Asked::Stand),
        SourceEffect::CancelCopy => Work::Ask(Asked::CancelCopy),
        SourceEffect::Say(message) => Work::Say(message),
        SourceEffect::Resume => Work::Cont,
        SourceEffect::TearDown => Work::Ask(Asked::Kill),
        // A stream that is held may end nevertheless: what is on its way already is not held.
        SourceEffect::Flow
        | SourceEffect::Hold
        | SourceEffect::Announce
        | SourceEffect::TooLate
        | SourceEffect::Over => Work::Nothing,
    }
}

fn of_destination(effect: DestinationEffect) -> Work {
    match effect {
        DestinationEffect::Journal => Work::Journal,
        DestinationEffect::Run => Work::Cont,
        DestinationEffect::Kill => Work::Ask(Asked::Kill),
        DestinationEffect::Say(message) => Work::Say(message),
        DestinationEffect::AllowSettle => Work::AllowSettle,
        DestinationEffect::Over => Work::Nothing,
    }
}
