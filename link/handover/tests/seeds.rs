//! Thousands of histories of a hand-over, each from a seed: faults of all kinds at all points. `GODWIT_SEED=n` replays one and prints it.
//!
//! The test is tested too: three faults are planted in the callers, and each must be found.

mod pair;

use std::collections::BTreeMap;

use pair::{At, Budget, Choice, CrashPoint, Pair, Planted};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

const SEEDS: u64 = 20_000;
/// How soon a planted fault must be found.
const SEEDS_PLANTED: u64 = 2_000;
/// Steps with faults, at most.
const STEPS_MAX: u64 = 160;

type Points = BTreeMap<(At, CrashPoint), u64>;

/// What one seed showed.
struct Run {
    broken: Option<String>,
    trace: Vec<String>,
    points: Points,
    faults: u64,
}

fn below(rng: &mut ChaCha8Rng, n: u64) -> u64 {
    rng.next_u64() % n
}

/// How often a choice is taken, against the others. A dying agent is wanted most in the middle of its work.
fn weight(pair: &Pair, choice: Choice, chaos: u64) -> u64 {
    let busy = |at: At| match at {
        At::A => !pair.a.idle(),
        At::B => !pair.b.idle(),
    };
    match choice {
        Choice::Work(_) | Choice::Hear(_) | Choice::Obey(_) | Choice::CopyOn | Choice::Connect => 60,
        Choice::Deliver(..) | Choice::StartAgent(_) | Choice::PowerOn(_) => 30,
        Choice::Resend(_) => 10,
        Choice::Settle => 4,
        Choice::Deadline(_) => 1,
        Choice::Lose(..) | Choice::Duplicate(..) => chaos,
        Choice::KillAgent(at) if busy(at) => 3 * chaos,
        Choice::KillAgent(_) => chaos / 3,
        Choice::Cancel(_) | Choice::Break | Choice::Disconnect | Choice::KillGuest(_) => chaos / 4,
        Choice::PowerOff(..) => chaos / 6,
    }
}

fn run(seed: u64, planted: Option<Planted>) -> Run {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut few = |most: u64| u8::try_from(below(&mut rng, most + 1)).expect("budgets are small");
    let budget = Budget {
        losses: few(6),
        duplicates: few(6),
        crashes: few(4),
        outages: few(1),
        kills: few(1),
        breaks: few(1),
        cancels: few(1),
        cuts: few(2),
    };
    let chaos = 2 + below(&mut rng, 20);
    let mut pair = Pair::new(below(&mut rng, 5) > 0, budget, planted);
    let mut run = Run {
        broken: None,
        trace: vec![format!("seed {seed}: run={} {budget:?}", pair.terms.run)],
        points: Points::new(),
        faults: 0,
    };
    for _ in 0..20 + below(&mut rng, STEPS_MAX) {
        let choices = pair.choices();
        let weights: Vec<u64> = choices.iter().map(|&choice| weight(&pair, choice, chaos)).collect();
        let total: u64 = weights.iter().sum();
        if total == 0 {
            break;
        }
        let mut at = below(&mut rng, total);
        let index = weights.iter().position(|&weight| match at.checked_sub(weight) {
            Some(rest) => {
                at = rest;
                false
            }
            None => true,
        });
        let choice = choices[index.expect("the weights add up to the total")];
        let result = pair.take(choice);
        run.note(&pair, choice);
        if let Err(what) = result {
            run.broken = Some(what);
            return run;
        }
    }
    run.broken = pair.heal().err();
    run
}

impl Run {
    fn note(&mut self, pair: &Pair, choice: Choice) {
        let point = pair.crashed;
        self.trace.push(format!(
            "{choice:?} {}A {:?} {:?} B {:?} {:?} {:?}",
            point.map(|(_, point)| format!("({point:?}) ")).unwrap_or_default(),
            pair.a.state(),
            pair.a.guest,
            pair.b.state(),
            pair.b.guest,
            pair.copy.stage,
        ));
        if let Some(point) = point {
            *self.points.entry(point).or_default() += 1;
        }
        let fault = matches!(
            choice,
            Choice::Lose(..)
                | Choice::Duplicate(..)
                | Choice::KillAgent(_)
                | Choice::KillGuest(_)
                | Choice::PowerOff(..)
                | Choice::Break
                | Choice::Cancel(_)
        );
        self.faults += u64::from(fault);
    }
}

/// The seeds to run: all, or the one that is asked for.
#[allow(
    clippy::disallowed_methods,
    reason = "a failed seed is replayed from the command line"
)]
fn seeds() -> std::ops::Range<u64> {
    match std::env::var("GODWIT_SEED") {
        Ok(text) => {
            let seed: u64 = text.parse().expect("GODWIT_SEED is a number");
            seed..seed + 1
        }
        Err(_) => 0..SEEDS,
    }
}

#[test]
fn no_history_has_two_runners_and_each_comes_to_an_end() {
    let seeds = seeds();
    let replay = seeds.end - seeds.start == 1;
    let (mut points, mut faults) = (Points::new(), 0);
    for seed in seeds {
        let run = run(seed, None);
        if replay {
            eprintln!("{}", run.trace.join("\n"));
        }
        if let Some(what) = run.broken {
            let trace = run.trace.join("\n");
            panic!("{trace}\n{what}\nGODWIT_SEED={seed} cargo test -p handover --test seeds");
        }
        faults += run.faults;
        for (point, hits) in run.points {
            *points.entry(point).or_default() += hits;
        }
    }
    eprintln!("{faults} faults; agents died: {points:?}");
    if replay {
        return;
    }
    for at in [At::A, At::B] {
        for point in [
            CrashPoint::BeforeJournal,
            CrashPoint::JournalledUnsent,
            CrashPoint::SentNotReceived,
            CrashPoint::ReceivedNotJournalled,
            CrashPoint::JournalledNoCont,
        ] {
            let hits = points.get(&(at, point)).copied().unwrap_or_default();
            assert!(hits >= 20, "{at:?} died {point:?} only {hits} times");
        }
    }
}

#[test]
fn each_planted_fault_is_found() {
    for planted in [
        Planted::ResumeOnLateFailure,
        Planted::RunWithoutRelease,
        Planted::LostIsNever,
    ] {
        let found = (0..SEEDS_PLANTED).find_map(|seed| run(seed, Some(planted)).broken.map(|what| (seed, what)));
        let (seed, what) = found.unwrap_or_else(|| panic!("{planted:?} was not found in {SEEDS_PLANTED} seeds"));
        eprintln!("{planted:?}: seed {seed}: {what}");
    }
}

#[test]
fn a_seed_is_the_same_history_each_time() {
    for seed in 0..50 {
        assert_eq!(run(seed, None).trace, run(seed, None).trace);
    }
}
