//! A process that is looked for, or does not obey: what ends it, however it is, and when it is told to end again.

use driver::Action;
use handover::{Destination, DestinationInput, Source, SourceInput, Standing};
use model::{
    Code, Message, Millis, Refusal,
    order::{Verb, VmOrder},
};

use crate::{
    effect::{Effect, Input, Timer},
    moving::MARGIN,
    saved::{Pending, Role},
    task::Task,
};

/// Between the first two times that a process which cannot be ended is told to end; then twice as long each time.
const KILL_AGAIN: Millis = Millis(500);
/// The longest such pause.
const KILL_AGAIN_MAX: Millis = Millis::seconds(30);

impl Task {
    /// The process is no longer heard. Whatever it was doing is found out anew, as after a restart: nothing is decided before.
    pub(crate) fn lost(&mut self) -> Vec<Effect> {
        if self.up.is_none() && !self.building && !self.recovering {
            return vec![];
        }
        self.recovering = true;
        self.building = false;
        vec![Effect::Adopt]
    }

    /// While the process is looked for: a destination's own deadline goes on, and a guest's grace begins anew, also for a process that
    /// never answers. How much of either was left nobody knows: a restarted agent has no clock of the last one's.
    pub(crate) fn deadline_of_search(&self) -> Option<Effect> {
        match &self.saved.role {
            Role::Destination {
                terms,
                state: Destination::Waiting(_),
            } => Some(Effect::Set(Timer::Deadline, Millis(terms.deadline.0 + MARGIN.0))),
            Role::Holder => match self.saved.pending {
                Some(Pending::End { grace: Some(grace) }) => Some(Effect::Set(Timer::Grace, grace)),
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether the process is to end, by what is written down.
    pub(crate) const fn is_doomed(&self) -> bool {
        match &self.saved.role {
            Role::Source { state, .. } => matches!(state, Source::HandedOver),
            Role::Destination { state, .. } => matches!(state, Destination::Ending { .. } | Destination::Void { .. }),
            Role::None | Role::Holder => match &self.saved.pending {
                Some(Pending::End { grace: None } | Pending::Remove { .. }) => true,
                Some(Pending::Start) => self.start_refused.is_some(),
                _ => false,
            },
        }
    }

    /// Whether a process that is there, but does not answer whoever looks for it, is to be ended without having been asked: what was
    /// decided before, or has come since, ends it however it is.
    #[must_use]
    pub fn ends_deaf(&self) -> bool {
        self.recovering && (self.is_doomed() || self.deferred.iter().any(|input| self.is_dooming(input)))
    }

    /// Whether this ends the process, whatever it does.
    fn is_dooming(&self, input: &Input) -> bool {
        let waits = |state: &Destination| matches!(state, Destination::Waiting(_));
        match (input, &self.saved.role) {
            (Input::Order(order), role) if !self.is_old(order) => match (&order.verb, role) {
                (Verb::Kill | Verb::Remove { .. }, _) => self.why_not(order).is_none(),
                // It has not decided to run: it may always end its container, and say so.
                (Verb::Cancel { terms }, Role::Destination { terms: mine, state }) => {
                    waits(state) && mine.granted == terms.granted
                }
                _ => false,
            },
            (Input::Timer(Timer::Grace), Role::Holder) => matches!(self.saved.pending, Some(Pending::End { .. })),
            (Input::Timer(Timer::Deadline | Timer::Settle), Role::Destination { state, .. }) => waits(state),
            (
                Input::Peer(peer),
                Role::Source {
                    terms,
                    state: Source::Released,
                    ..
                },
            ) => peer.message == Message::Run && peer.host == terms.destination && peer.granted == terms.granted,
            _ => false,
        }
    }

    /// Whether an order was told already, or is of a leader that is deposed.
    fn is_old(&self, order: &VmOrder) -> bool {
        order.epoch < self.saved.epoch || order.revision <= self.saved.revision
    }

    /// Something was refused of a process that is to end: it is ended the hard way, and told so again with growing pauses where it
    /// cannot be.
    pub(crate) fn end_again(&self) -> Vec<Effect> {
        match self.kills.checked_sub(1) {
            None => vec![Effect::Act(Action::Kill)],
            Some(before) => {
                let pause = KILL_AGAIN.0 << before.min(10);
                vec![Effect::Set(Timer::Retry, Millis(pause.min(KILL_AGAIN_MAX.0)))]
            }
        }
    }

    /// What a source whose copy goes on has asked of its process and not got: it may have been refused, as while the monitor was lost.
    pub(crate) fn moving_asked_again(&self) -> Vec<Effect> {
        let Role::Source {
            state: Source::Copying {
                standing, giving_up, ..
            },
            ..
        } = &self.saved.role
        else {
            return vec![];
        };
        match (self.up, giving_up, standing) {
            (None, _, _) => vec![],
            _ if self.recovering || !self.moving.copying => vec![],
            (_, Some(_), _) => vec![Effect::Act(Action::CancelCopy)],
            _ if self.moving.attending => vec![Effect::Act(Action::Attend)],
            (_, None, Standing::Asked) => vec![Effect::Act(Action::Stand)],
            _ => vec![],
        }
    }

    pub(crate) fn moving_refused(&mut self, text: &str) -> Vec<Effect> {
        match &self.saved.role {
            Role::Source {
                state: Source::Copying { .. },
                ..
            } if !self.moving.copying => self.source(SourceInput::CopyFailed {
                reason: Refusal::new(Code::HostFailed, text),
            }),
            Role::Source { .. } => self.try_again(),
            // It is ours, and nobody else's any more: asked again until it runs.
            Role::Destination { state, .. } if state.may_run() => self.try_again(),
            _ => self.destination(DestinationInput::GiveUp {
                reason: text.to_owned(),
            }),
        }
    }
}
