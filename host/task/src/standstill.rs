//! The standstill of a move: when it is asked for, and what becomes of what the guest misses in it.

use driver::CopyState;
use model::Millis;

use crate::{
    effect::{Effect, Missed},
    saved::Role,
    task::Task,
};

/// The standstill aimed at.
pub(crate) const DOWNTIME_AIM: Millis = Millis(2);
/// The longest standstill that a guest which keeps writing is given in the end.
const DOWNTIME_MAX: Millis = Millis::seconds(2);
/// So little is left that it is sent in no time, whatever the speed is.
const TRIFLE_BYTES: u64 = 256 * 1024;

/// Whether what is left is sent within the standstill that is allowed by now: [`DOWNTIME_AIM`] after the first round, then twice as much
/// with each further one, up to [`DOWNTIME_MAX`]. A calm guest leaves less with each round, and is worth the few milliseconds that
/// another one takes; a guest that writes as fast as the link takes ends too, with a longer standstill.
#[must_use]
pub fn nearly_done(copy: &CopyState) -> bool {
    let doublings = copy.round.saturating_sub(2).min(20);
    let allowed_ms = (DOWNTIME_AIM.0 << doublings).min(DOWNTIME_MAX.0);
    let fits = copy.bytes_per_s.saturating_mul(allowed_ms) / 1000;
    copy.round > 1 && copy.remaining_bytes <= fits.max(TRIFLE_BYTES)
}

impl Task {
    /// An agent that was restarted since the guest stood kept nothing.
    pub(crate) fn hand_over_missed(&self) -> Vec<Effect> {
        match (&self.saved.role, self.moving.stopped_at_ms) {
            (Role::Source { terms, .. }, Some(stood_at_ms)) => vec![Effect::Missed(Missed::HandOver {
                to: terms.destination,
                granted: terms.granted,
                stood_at_ms,
            })],
            _ => vec![],
        }
    }
}
