//! When the stream of a move flows: not while the guest runs and the destination's agent could not be told that it stands.

use driver::Condition;
use handover::{Source, SourceInput};
use model::{Code, Refusal};

use crate::{
    effect::{Effect, Tunnel},
    saved::Role,
    task::Task,
};

impl Task {
    /// The connection to the destination's agent came or went.
    pub(crate) fn peer_link(&mut self, up: bool) -> Vec<Effect> {
        self.moving.peer_up = up;
        // Nothing is decided before it is known whether there is a process; see `found_copying`.
        match self.recovering {
            true => vec![],
            false => self.source(Self::peer_input(up)),
        }
    }

    const fn peer_input(up: bool) -> SourceInput {
        match up {
            true => SourceInput::PeerConnected,
            false => SourceInput::PeerLost,
        }
    }

    /// Whether the stream may flow now, where there is one.
    pub(crate) fn flow(&self) -> Vec<Effect> {
        match &self.saved.role {
            Role::Source { state, .. } if self.moving.copying && state.flows() => vec![Effect::Tunnel(Tunnel::Flow)],
            _ => vec![],
        }
    }

    /// After a restart: the process is there, and its copy is to be attended to.
    pub(crate) fn found_copying(&mut self, condition: Condition) -> Vec<Effect> {
        let mut effects = self.source(Self::peer_input(self.moving.peer_up));
        if matches!(condition, Condition::Standing | Condition::Sent) {
            // Told to by the last agent, or by itself: what was asked for nobody knows any more.
            effects.extend(self.source(SourceInput::Stood { settled: false }));
        }
        effects
    }

    /// What the copy is doing, for people.
    pub(crate) fn doing(&self) -> &'static str {
        match &self.saved.role {
            Role::Source { state, .. } if !state.flows() => "waiting for the destination's agent",
            _ => "copying memory",
        }
    }

    /// Why a move that took too long is given up.
    pub(crate) fn out_of_time(&self) -> Refusal {
        let vm = self.name();
        match &self.saved.role {
            Role::Source {
                state: Source::Copying { connected: false, .. },
                ..
            } => Refusal::new(
                Code::TimedOut,
                format!("{vm} did not move within its deadline: there was no connection to the destination's agent"),
            )
            .hint("start that agent; the VM runs on where it was"),
            _ => Refusal::new(
                Code::TimedOut,
                format!("{vm} did not move within its deadline; it runs on where it was"),
            ),
        }
    }

    /// Why a move ended with the VM's process.
    pub(crate) fn died_moving(&self, detail: &str) -> Refusal {
        let name = self.name();
        let text = match self.powered_off {
            true => format!("{name} was not moved: its guest powered off"),
            false => format!("{name} died while it was moved: {detail}"),
        };
        Refusal::new(Code::HostFailed, text).hint(format!("start it: `godwit vm start {name}`"))
    }

    /// Why a VM stays: its copy broke. What the other end does is seen by the connection to its agent alone.
    pub(crate) fn not_copied(&self, why: &str) -> Refusal {
        let name = self.name();
        let (code, seen, hint) = match self.moving.peer_up {
            true => (
                Code::HostFailed,
                "the destination's agent answers, so its QEMU or the stream's connection ended",
                "ask again; if it fails again, the destination's log tells why",
            ),
            false => (
                Code::HostUnreachable,
                "the destination's agent does not answer either, so the link is cut or that host is down",
                "see that host: `godwit host list`; then ask again",
            ),
        };
        Refusal::new(code, format!("{name} was not moved: {why}; {seen}")).hint(hint)
    }

    /// What people call it.
    pub(crate) fn name(&self) -> String {
        match &self.saved.definition {
            Some(definition) => definition.name.to_string(),
            None => format!("VM {}", self.saved.vm),
        }
    }
}
