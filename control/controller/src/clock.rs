//! The controller's clock: the machine's, but one that never jumps.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use model::Timestamp;

/// UTC that follows the machine's clock by at most 5 % of the time that passes: an hour's jump either way ends no operation and
/// expires no token early, and the display is right again a day later.
#[derive(Debug)]
pub(crate) struct Clock(Mutex<State>);

#[derive(Debug)]
struct State {
    read: Instant,
    shown: Duration,
}

/// A twentieth of what passes may go into catching up.
const SLEW: u32 = 20;

impl Clock {
    pub(crate) fn start() -> Self {
        Self(Mutex::new(State {
            read: Instant::now(),
            shown: wall(),
        }))
    }

    pub(crate) fn now(&self) -> Timestamp {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let read = Instant::now();
        state.shown = follow(state.shown, read.saturating_duration_since(state.read), wall());
        state.read = read;
        Timestamp(i64::try_from(state.shown.as_millis()).unwrap_or(i64::MAX))
    }
}

fn wall() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn follow(shown: Duration, passed: Duration, wall: Duration) -> Duration {
    let shown = shown + passed;
    let most = passed / SLEW;
    if wall >= shown {
        shown + (wall - shown).min(most)
    } else {
        shown - (shown - wall).min(most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_hours_jump_of_the_machines_clock_is_followed_slowly_and_time_never_stands() {
        let second = Duration::from_secs(1);
        let start = Duration::from_secs(1_790_000_000);
        for wall in [start + Duration::from_secs(3600), start - Duration::from_secs(3600)] {
            let after = follow(start, second, wall);
            assert!(
                after >= start + second * 19 / 20 && after <= start + second * 21 / 20,
                "{after:?}"
            );
        }
        assert_eq!(follow(start, second, start + second), start + second);
        assert_eq!(follow(start, Duration::ZERO, start + second), start);
    }

    #[test]
    fn a_small_difference_is_made_good() {
        let mut shown = Duration::from_secs(100);
        let mut wall = shown + Duration::from_secs(1);
        for _ in 0..30 {
            wall += Duration::from_secs(1);
            shown = follow(shown, Duration::from_secs(1), wall);
        }
        assert_eq!(shown, wall);
    }
}
