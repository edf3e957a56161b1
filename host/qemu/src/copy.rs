//! Bookkeeping of an outgoing copy: rounds, speed, end. No input and output here.

use std::time::{Duration, Instant};

use driver::{CopyCost, CopyState, Happened};
use model::Round;
use qmp::{MigrationInfo, MigrationRam, MigrationStatus};

/// The shortest interval over which a speed is told: two looks in a row, by a timer and by an event, tell nothing.
const RATE_OVER: Duration = Duration::from_millis(10);

/// A copy under way.
#[derive(Debug, Clone)]
pub(crate) struct Copy {
    last: Mark,
    /// Speed over the last interval that was long enough to tell.
    bytes_per_s: u64,
    round_began: Mark,
    round: u64,
    /// When it was asked to stop.
    pub(crate) cancelled: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Mark {
    at: Instant,
    bytes: u64,
}

impl Mark {
    /// Bytes a second since this mark; 0 when no time has passed.
    fn rate(self, at: Instant, bytes: u64) -> u64 {
        let micros = at.saturating_duration_since(self.at).as_micros();
        let sent = u128::from(bytes.saturating_sub(self.bytes));
        (sent * 1_000_000)
            .checked_div(micros)
            .and_then(|rate| u64::try_from(rate).ok())
            .unwrap_or(0)
    }
}

impl Copy {
    pub(crate) fn begin(at: Instant) -> Self {
        Self::from(Mark { at, bytes: 0 }, 0)
    }

    /// A copy that an earlier agent began: its speed is counted from what was sent by now.
    pub(crate) fn attend(info: &MigrationInfo, at: Instant) -> Self {
        let ram = info.ram.clone().unwrap_or_default();
        let mark = Mark {
            at,
            bytes: ram.transferred,
        };
        Self::from(mark, ram.dirty_sync_count)
    }

    fn from(mark: Mark, round: u64) -> Self {
        Self {
            last: mark,
            bytes_per_s: 0,
            round_began: mark,
            round,
            cancelled: None,
        }
    }

    /// What an answer of `query-migrate` at `at` means, and whether the copy is over with it.
    pub(crate) fn seen(&mut self, info: &MigrationInfo, at: Instant) -> (Vec<Happened>, bool) {
        let ram = info.ram.clone().unwrap_or_default();
        let over = info.status.is_over();
        let ended = (ram.dirty_sync_count > self.round || over)
            .then(|| self.end_round(&ram, at))
            .flatten();
        if at.saturating_duration_since(self.last.at) >= RATE_OVER {
            self.bytes_per_s = self.last.rate(at, ram.transferred);
            self.last = Mark {
                at,
                bytes: ram.transferred,
            };
        }
        let state = CopyState {
            bytes: ram.transferred,
            remaining_bytes: ram.remaining,
            bytes_per_s: self.bytes_per_s,
            round: self.round.max(1),
            ended,
        };
        let mut happened = Vec::new();
        if info.ram.is_some() && (!over || ended.is_some()) {
            happened.push(Happened::Copying(state));
        }
        if over {
            happened.push(outcome(info));
        }
        (happened, over)
    }

    /// QEMU counts a round when it begins: the one before has ended. A round shorter than the interval of asking is lost in the next.
    fn end_round(&mut self, ram: &MigrationRam, at: Instant) -> Option<Round> {
        let (began, number) = (self.round_began, self.round);
        self.round_began = Mark {
            at,
            bytes: ram.transferred,
        };
        self.round = ram.dirty_sync_count;
        let duration = at.saturating_duration_since(began.at);
        (number > 0).then(|| Round {
            number,
            duration_ms: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
            bytes: ram.transferred.saturating_sub(began.bytes),
            remaining_bytes: ram.remaining,
            dirty_pages_per_s: ram.dirty_pages_rate,
            // QEMU's figure where it has one: it is over its own interval of 100 ms.
            mbps: if ram.mbps > 0.0 {
                ram.mbps as u64
            } else {
                began.rate(at, ram.transferred) * 8 / 1_000_000
            },
        })
    }
}

/// How a copy that is over ended.
pub(crate) fn outcome(info: &MigrationInfo) -> Happened {
    match &info.status {
        MigrationStatus::Completed => {
            let bytes = info.ram.as_ref().map_or(0, |ram| ram.transferred);
            Happened::Copied {
                cost: CopyCost {
                    downtime_ms: info.downtime.unwrap_or(0),
                    bytes,
                },
            }
        }
        MigrationStatus::Cancelled => Happened::CopyFailed {
            reason: "the copy was cancelled".to_owned(),
        },
        MigrationStatus::Failed => {
            let reason = info
                .error_desc
                .clone()
                .unwrap_or_else(|| "QEMU gives no reason".to_owned());
            Happened::CopyFailed {
                reason: format!("its copy broke: {reason}"),
            }
        }
        _ => Happened::CopyFailed {
            reason: "no copy is under way".to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(status: MigrationStatus, pass: u64, transferred: u64, remaining: u64) -> MigrationInfo {
        let ram = MigrationRam {
            dirty_sync_count: pass,
            transferred,
            remaining,
            ..MigrationRam::default()
        };
        MigrationInfo {
            status,
            ram: Some(ram),
            downtime: Some(4),
            ..MigrationInfo::default()
        }
    }

    #[test]
    fn a_copy_that_is_attended_or_looked_at_twice_in_a_row_tells_no_wild_speed() {
        let begin = Instant::now();
        let after = |ms| begin + Duration::from_millis(ms);
        let mut copy = Copy::attend(&info(MigrationStatus::Active, 2, 4 << 30, 1 << 30), begin);
        let speed = |copy: &mut Copy, bytes, at| match copy.seen(&info(MigrationStatus::Active, 2, bytes, 1 << 30), at)
        {
            (told, false) => match told.as_slice() {
                [Happened::Copying(state)] => state.bytes_per_s,
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        };
        assert_eq!(speed(&mut copy, 4 << 30, after(1)), 0);
        assert_eq!(speed(&mut copy, (4 << 30) + 1000, after(100)), 10_000);
        assert_eq!(speed(&mut copy, (4 << 30) + 2000, after(101)), 10_000);
    }

    #[test]
    fn rounds_are_told_as_they_end_and_the_cost_at_the_end() {
        let begin = Instant::now();
        let after = |ms| begin + Duration::from_millis(ms);
        let mut copy = Copy::begin(begin);
        let (told, over) = copy.seen(&info(MigrationStatus::Active, 1, 1000, 9000), after(100));
        let expected = CopyState {
            bytes: 1000,
            remaining_bytes: 9000,
            bytes_per_s: 10_000,
            round: 1,
            ended: None,
        };
        assert_eq!((told, over), (vec![Happened::Copying(expected)], false));

        let (told, _) = copy.seen(&info(MigrationStatus::Active, 2, 10_000, 500), after(1000));
        let [Happened::Copying(state)] = told.as_slice() else {
            panic!("{told:?}")
        };
        let round = state.ended.unwrap();
        assert_eq!(
            (
                state.round,
                round.number,
                round.bytes,
                round.duration_ms,
                round.remaining_bytes
            ),
            (2, 1, 9000, 900, 500)
        );

        let (told, over) = copy.seen(&info(MigrationStatus::Completed, 3, 10_600, 0), after(1100));
        let [Happened::Copying(state), Happened::Copied { cost }] = told.as_slice() else {
            panic!("{told:?}")
        };
        assert_eq!(state.ended.map(|round| (round.number, round.bytes)), Some((2, 600)));
        assert_eq!(
            (*cost, over),
            (
                CopyCost {
                    downtime_ms: 4,
                    bytes: 10_600
                },
                true
            )
        );
    }

    #[test]
    fn a_failure_tells_why_and_counters_that_stand_divide_nothing() {
        let begin = Instant::now();
        let mut copy = Copy::begin(begin);
        let failed = MigrationInfo {
            status: MigrationStatus::Failed,
            error_desc: Some("Broken pipe".to_owned()),
            ..MigrationInfo::default()
        };
        let (told, over) = copy.seen(&failed, begin);
        assert_eq!(
            told,
            [Happened::CopyFailed {
                reason: "its copy broke: Broken pipe".to_owned()
            }]
        );
        assert!(over);
    }
}
