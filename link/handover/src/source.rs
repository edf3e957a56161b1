//! The side that holds the VM and gives it up.

use model::{BootId, Code, Message, Refusal, Terms};
use serde::{Deserialize, Serialize};

/// What the source has decided so far. This is what its journal keeps.
///
/// ```text
///   Copying ──▶ Released ──▶ HandedOver
///      │            └──────▶ Reclaimed
///      └──▶ Kept                          any, after a reboot before Released or without a record ──▶ Unknown
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "source", rename_all = "kebab-case")]
pub enum Source {
    /// Memory is being copied; the VM is ours.
    Copying {
        /// Whether the guest stands.
        standing: Standing,
        /// Why the copy is being given up, once it is.
        #[serde(default)]
        giving_up: Option<Refusal>,
        /// Whether the destination's agent would hear us now. Of no use to another agent, so the journal does not keep it.
        #[serde(skip)]
        connected: bool,
    },
    /// We have given the VM up. Only the destination's word ends this.
    Released,
    /// The destination has it. What is left here is to be torn down.
    HandedOver,
    /// The destination will never have it; it is ours again under [`Terms::reclaimed`].
    Reclaimed,
    /// It was never given up; it is ours under [`Terms::held`].
    Kept {
        /// Why it did not move.
        reason: Refusal,
    },
    /// This host rebooted and cannot know whether it had given the VM up.
    Unknown,
}

/// Whether the guest stands on the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// It runs.
    No,
    /// It was told to stand.
    Asked,
    /// It stands, but the hypervisor has begun to complete and may resume it by itself should that fail.
    Unsettled,
    /// It stands because it was told to, and stays so whatever becomes of the copy.
    Settled,
}

/// What happened at the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceInput {
    /// From now on the destination's agent hears what is said to it.
    PeerConnected,
    /// It does not any more.
    PeerLost,
    /// The little that is left fits the downtime: time to stand.
    NearlyDone,
    /// The guest stands.
    Stood {
        /// Whether it stays so whatever becomes of the copy.
        settled: bool,
    },
    /// The copy completed and the destination said so on the return path: the guest stands for good.
    Copied,
    /// The copy failed. A guest that was not told to stand runs again by itself.
    CopyFailed {
        /// Why.
        reason: Refusal,
    },
    /// The VM's process is dead.
    Died {
        /// Why.
        reason: Refusal,
    },
    /// Give it up, if that can still be: a person's cancel, or our own deadline.
    GiveUp {
        /// Why.
        reason: Refusal,
    },
    /// The destination said something.
    Heard(Message),
    /// Time to say it again.
    Resend,
}

/// What the source is to do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceEffect {
    /// Write this state to the journal before going on.
    Journal,
    /// Let the stream flow.
    Flow,
    /// Hold the stream: the hypervisor would end a copy by itself, and nobody could be told that the guest stands.
    Hold,
    /// Make the guest stand.
    Stand,
    /// Stop copying.
    CancelCopy,
    /// Say this to the destination, and set the timer for [`SourceInput::Resend`] unless it is over.
    Say(Message),
    /// Let the guest run again, if it is to run; it is ours under [`Terms::held`], or [`Terms::reclaimed`] after `Void`.
    Resume,
    /// Announce where the guest is, since the destination may have announced it.
    Announce,
    /// The destination has it: clear everything here.
    TearDown,
    /// The cancel came after the release.
    TooLate,
    /// It is over without a move.
    Over,
}

impl Source {
    /// The beginning: the VM is ours and runs, or stands because its user paused it.
    #[must_use]
    pub const fn begin() -> Self {
        Self::Copying {
            standing: Standing::No,
            giving_up: None,
            connected: false,
        }
    }

    /// What is known after the agent restarted.
    ///
    /// `saved` is the journal's last record, if any; `boot` is the host's boot now.
    #[must_use]
    pub fn recover(terms: &Terms, saved: Option<Self>, boot: BootId) -> Self {
        match saved {
            Some(over @ (Self::Released | Self::HandedOver | Self::Reclaimed | Self::Kept { .. } | Self::Unknown)) => {
                over
            }
            // A later record may have been lost with the unsynced tail, unless this is still the same boot.
            Some(Self::Copying { .. }) if boot == terms.source_boot => saved_copying(),
            Some(Self::Copying { .. }) | None => Self::Unknown,
        }
    }

    /// Whether only a person or a fence can go on from here, or nothing is to be done.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        !matches!(self, Self::Copying { .. } | Self::Released)
    }

    /// Whether the guest may run here: it was never given up, or has come back.
    #[must_use]
    pub const fn may_run(&self) -> bool {
        matches!(self, Self::Copying { .. } | Self::Kept { .. } | Self::Reclaimed)
    }

    /// Whether the stream may flow. While the guest runs it must not end unless the destination's agent can be told so. A guest that
    /// stands already gains nothing by waiting.
    #[must_use]
    pub const fn flows(&self) -> bool {
        match self {
            Self::Copying {
                standing, connected, ..
            } => *connected || !matches!(standing, Standing::No),
            _ => true,
        }
    }

    /// Takes what happened and returns what to do, in order.
    pub fn step(&mut self, input: SourceInput) -> Vec<SourceEffect> {
        match self {
            Self::Copying { .. } => {
                let flowed = self.flows();
                let mut effects = self.step_copying(input);
                match (flowed, self.flows()) {
                    (false, true) if !self.is_over() => effects.insert(0, SourceEffect::Flow),
                    (true, false) => effects.insert(0, SourceEffect::Hold),
                    _ => {}
                }
                effects
            }
            Self::Released => self.step_released(input),
            Self::HandedOver | Self::Reclaimed | Self::Kept { .. } | Self::Unknown => match input {
                SourceInput::GiveUp { .. } if *self == Self::HandedOver => vec![SourceEffect::TooLate],
                _ => vec![],
            },
        }
    }

    fn step_copying(&mut self, input: SourceInput) -> Vec<SourceEffect> {
        let Self::Copying {
            standing,
            giving_up,
            connected,
        } = self
        else {
            return vec![];
        };
        match input {
            SourceInput::PeerConnected | SourceInput::PeerLost => {
                *connected = matches!(input, SourceInput::PeerConnected);
                vec![]
            }
            SourceInput::NearlyDone if *standing == Standing::No && giving_up.is_none() && *connected => {
                *standing = Standing::Asked;
                vec![SourceEffect::Stand]
            }
            // The cancel was asked for first: the hypervisor's answer to it decides.
            SourceInput::Stood { settled } if giving_up.is_some() => {
                *standing = if settled {
                    Standing::Settled
                } else {
                    Standing::Unsettled
                };
                vec![]
            }
            SourceInput::Stood { settled: true } if *standing == Standing::Asked && *connected => self.release(),
            // Lost between the question and the answer: once released the guest might stand for ever.
            SourceInput::Stood { .. } if *standing == Standing::Asked && !*connected => {
                *standing = Standing::Unsettled;
                *giving_up = Some(unheard());
                vec![SourceEffect::CancelCopy]
            }
            // Nobody asked for it yet: a driver stands some guests before it copies, and much may be left to send. `Copied` releases.
            SourceInput::Stood { .. } => {
                *standing = Standing::Unsettled;
                vec![]
            }
            // Complete beats a cancel under way: the guest stands for good, and the destination has all of it.
            SourceInput::Copied if *connected => self.release(),
            // Nobody hears that it may run there. What was not released is ours, complete or not.
            SourceInput::Copied => {
                let reason = giving_up.take().unwrap_or_else(unheard);
                self.keep(reason)
            }
            SourceInput::CopyFailed { reason } => {
                let reason = giving_up.take().unwrap_or(reason);
                self.keep(reason)
            }
            SourceInput::Died { reason } => {
                *self = Self::Kept { reason };
                vec![SourceEffect::Journal, SourceEffect::Over]
            }
            SourceInput::GiveUp { reason } if giving_up.is_none() => {
                *giving_up = Some(reason);
                vec![SourceEffect::CancelCopy]
            }
            SourceInput::Heard(Message::Void) if giving_up.is_none() => {
                *giving_up = Some(Refusal::new(
                    Code::HostFailed,
                    "the destination gave up before the memory was there",
                ));
                vec![SourceEffect::CancelCopy]
            }
            // `Run` cannot be: nothing was released. Whoever says so is not believed.
            SourceInput::Heard(_) | SourceInput::NearlyDone | SourceInput::GiveUp { .. } | SourceInput::Resend => {
                vec![]
            }
        }
    }

    /// The point of no return: nothing after the journal's record can fail back without the destination's word.
    fn release(&mut self) -> Vec<SourceEffect> {
        *self = Self::Released;
        vec![SourceEffect::Journal, SourceEffect::Say(Message::Release)]
    }

    fn keep(&mut self, reason: Refusal) -> Vec<SourceEffect> {
        *self = Self::Kept { reason };
        vec![
            SourceEffect::Journal,
            SourceEffect::Resume,
            SourceEffect::Announce,
            SourceEffect::Over,
        ]
    }

    fn step_released(&mut self, input: SourceInput) -> Vec<SourceEffect> {
        match input {
            SourceInput::Heard(Message::Run) => {
                *self = Self::HandedOver;
                vec![SourceEffect::Journal, SourceEffect::TearDown]
            }
            SourceInput::Heard(Message::Void) => {
                *self = Self::Reclaimed;
                vec![
                    SourceEffect::Journal,
                    SourceEffect::Resume,
                    SourceEffect::Announce,
                    SourceEffect::Over,
                ]
            }
            SourceInput::Heard(Message::Ask) | SourceInput::Resend => vec![SourceEffect::Say(Message::Release)],
            SourceInput::GiveUp { .. } => vec![SourceEffect::TooLate],
            // Copied or not, dead or not: it is the destination's to decide.
            SourceInput::Heard(Message::Release)
            | SourceInput::PeerConnected
            | SourceInput::PeerLost
            | SourceInput::NearlyDone
            | SourceInput::Stood { .. }
            | SourceInput::Copied
            | SourceInput::CopyFailed { .. }
            | SourceInput::Died { .. } => vec![],
        }
    }
}

/// Whether the guest stands is asked of the process again: the agent may have died between asking and the answer.
const fn saved_copying() -> Source {
    Source::Copying {
        standing: Standing::No,
        giving_up: None,
        connected: false,
    }
}

/// Why a guest that stood already is not given away.
fn unheard() -> Refusal {
    Refusal::new(
        Code::HostUnreachable,
        "the connection to the destination's agent was lost just when the VM was to be handed over",
    )
    .hint("ask again once that agent runs: godwit host list")
}
