//! The side that gets the VM, and decides.

use model::{BootId, Message, Terms};
use serde::{Deserialize, Serialize};

/// What the destination has decided so far. This is what its journal keeps.
///
/// ```text
///   Waiting ──────▶ Run
///      └─▶ Ending ──▶ Void           Waiting or no record, after a reboot ──▶ Unknown
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "destination", rename_all = "kebab-case")]
pub enum Destination {
    /// A container waits for the state and for the release.
    Waiting(Receiving),
    /// The container is being ended; `Void` follows when it is dead.
    Ending {
        /// Why.
        reason: String,
    },
    /// Ours under [`Terms::granted`].
    Run,
    /// It never will be ours under these terms.
    Void {
        /// Why.
        reason: String,
    },
    /// This host rebooted and cannot know whether it had run the VM.
    Unknown,
}

/// What has come to a waiting container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receiving {
    /// All memory, device state and disks.
    pub complete: bool,
    /// The source's release.
    pub released: bool,
}

/// What happened at the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationInput {
    /// The whole state is loaded.
    Complete,
    /// The container is dead, for certain.
    Died {
        /// What is known of it.
        reason: String,
    },
    /// Give it up if it is not decided: the stream broke, our deadline, the controller's word.
    GiveUp {
        /// Why.
        reason: String,
    },
    /// The source said something.
    Heard(Message),
    /// Time to say it, or to ask, again.
    Resend,
}

/// What the destination is to do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DestinationEffect {
    /// Write this state to the journal before going on.
    Journal,
    /// Let the guest run, unless its user had paused it, open its port, and announce it. Idempotent.
    Run,
    /// End the container; [`DestinationInput::Died`] follows.
    Kill,
    /// Say this to the source.
    Say(Message),
    /// One of the two that are needed is here: allow [`Terms::settle`] for the other, then [`DestinationInput::GiveUp`].
    AllowSettle,
    /// It is over without a move.
    Over,
}

/// What a restarted agent must do first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// The state.
    pub state: Destination,
    /// What to do now, in order.
    pub effects: Vec<DestinationEffect>,
}

impl Destination {
    /// The beginning: a container waits.
    #[must_use]
    pub fn begin() -> Self {
        Self::Waiting(Receiving::default())
    }

    /// What is known after the agent restarted, and what to do first.
    ///
    /// `saved` is the journal's last record, if any; `boot` is the host's boot now; `alive` whether the container was found
    /// again. A `Run` that was journalled without the guest being let run is made good by the effects.
    #[must_use]
    pub fn recover(terms: &Terms, saved: Option<Self>, boot: BootId, alive: bool) -> Recovered {
        let same_boot = boot == terms.destination_boot;
        match saved {
            Some(Self::Run) if same_boot && alive => Recovered {
                state: Self::Run,
                effects: vec![DestinationEffect::Run, DestinationEffect::Say(Message::Run)],
            },
            // Ours, and lost with its process: never back to the source, since the disks may have been written.
            Some(Self::Run) => Recovered {
                state: Self::Run,
                effects: vec![DestinationEffect::Say(Message::Run)],
            },
            Some(Self::Void { reason }) => Recovered {
                state: Self::Void { reason },
                effects: vec![DestinationEffect::Say(Message::Void)],
            },
            Some(Self::Waiting(_)) if same_boot && alive => {
                // What came before the crash is asked for again: completeness of the process, the release of the source.
                Recovered {
                    state: Self::begin(),
                    effects: vec![DestinationEffect::Say(Message::Ask)],
                }
            }
            Some(Self::Waiting(_) | Self::Ending { .. }) if same_boot => {
                let mut state = Self::begin();
                let reason = match alive {
                    true => "it was being ended when the agent restarted",
                    false => "its process was gone when the agent restarted",
                };
                let input = match alive {
                    true => DestinationInput::GiveUp {
                        reason: reason.to_owned(),
                    },
                    false => DestinationInput::Died {
                        reason: reason.to_owned(),
                    },
                };
                let effects = state.step(input);
                Recovered { state, effects }
            }
            Some(Self::Waiting(_) | Self::Ending { .. } | Self::Unknown) | None => Recovered {
                state: Self::Unknown,
                effects: vec![DestinationEffect::Over],
            },
        }
    }

    /// Whether nothing more is decided.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        matches!(self, Self::Run | Self::Void { .. } | Self::Unknown)
    }

    /// Whether the guest may run here.
    #[must_use]
    pub const fn may_run(&self) -> bool {
        matches!(self, Self::Run)
    }

    /// Takes what happened and returns what to do, in order.
    pub fn step(&mut self, input: DestinationInput) -> Vec<DestinationEffect> {
        match self {
            Self::Waiting(_) => self.step_waiting(input),
            Self::Ending { reason } => match input {
                DestinationInput::Died { .. } => {
                    let reason = std::mem::take(reason);
                    self.void(reason)
                }
                // The release, the state or another reason come too late: an ended container can only be void.
                _ => vec![],
            },
            Self::Run => answer(&input, Message::Run),
            Self::Void { .. } => answer(&input, Message::Void),
            Self::Unknown => vec![],
        }
    }

    fn step_waiting(&mut self, input: DestinationInput) -> Vec<DestinationEffect> {
        let Self::Waiting(has) = self else { return vec![] };
        let before = *has;
        match input {
            DestinationInput::Complete => has.complete = true,
            DestinationInput::Heard(Message::Release) => has.released = true,
            DestinationInput::Died { reason } => return self.void(reason),
            DestinationInput::GiveUp { reason } => {
                *self = Self::Ending { reason };
                // In the journal first: a restarted agent must not decide `Run` for a process that is about to die.
                return vec![DestinationEffect::Journal, DestinationEffect::Kill];
            }
            DestinationInput::Resend => return vec![DestinationEffect::Say(Message::Ask)],
            DestinationInput::Heard(_) => return vec![],
        }
        match (before == *has, has.complete && has.released) {
            (true, _) => vec![],
            (false, true) => {
                *self = Self::Run;
                vec![
                    DestinationEffect::Journal,
                    DestinationEffect::Run,
                    DestinationEffect::Say(Message::Run),
                ]
            }
            (false, false) => vec![DestinationEffect::AllowSettle],
        }
    }

    fn void(&mut self, reason: String) -> Vec<DestinationEffect> {
        *self = Self::Void { reason };
        vec![
            DestinationEffect::Journal,
            DestinationEffect::Say(Message::Void),
            DestinationEffect::Over,
        ]
    }
}

/// A decision is repeated to whoever asks, and is never changed.
fn answer(input: &DestinationInput, decision: Message) -> Vec<DestinationEffect> {
    match input {
        DestinationInput::Heard(Message::Release | Message::Ask) | DestinationInput::Resend => {
            vec![DestinationEffect::Say(decision)]
        }
        _ => vec![],
    }
}
