//! A thousand seeds of the whole: what must never be never is, and what must come about does. `GODWIT_SEED=n` replays one and prints it.

use std::collections::BTreeMap;

use sim::{Options, Outcome, run};

const SEEDS: u64 = 1_000;

fn replayed() -> Option<u64> {
    let text = std::env::var("GODWIT_SEED").ok()?;
    Some(text.parse().expect("GODWIT_SEED is a number"))
}

fn checked(seed: u64, trace: bool) -> Outcome {
    let options = Options {
        trace,
        ..Options::default()
    };
    let outcome = run(seed, options);
    for line in &outcome.trace {
        eprintln!("{line}");
    }
    let replay = format!("GODWIT_SEED={seed} cargo test -p sim --test seeds");
    assert_eq!(outcome.broken, None, "seed {seed}; replay it: {replay}");
    outcome
}

#[test]
fn whatever_fails_no_vm_runs_twice_and_all_comes_to_rest() {
    if let Some(seed) = replayed() {
        checked(seed, true);
        return;
    }
    let (mut moved, mut rolled_back, mut succeeded, mut failed) = (0, 0, 0, 0);
    let mut faults = BTreeMap::<&str, u64>::new();
    for seed in 0..SEEDS {
        let outcome = checked(seed, false);
        moved += outcome.moved;
        rolled_back += outcome.rolled_back;
        succeeded += outcome.succeeded;
        failed += outcome.failed;
        for (fault, times) in outcome.faults {
            *faults.entry(fault).or_default() += times;
        }
    }
    eprintln!(
        "{moved} moves arrived, {rolled_back} did not; {succeeded} other operations succeeded, {failed} did not; {faults:?}"
    );
    // No fault, but what comes of some: a source that waits for the destination's agent.
    let held = faults.get("stream held").copied().unwrap_or_default();
    assert!(held > SEEDS / 100, "a stream was held {held} times");
    // A simulator in which little happens finds little.
    assert!(moved > 2 * SEEDS && rolled_back > SEEDS / 2 && succeeded > 5 * SEEDS && failed > SEEDS / 2);
    let kinds = [
        "agent died between two effects",
        "agent killed",
        "controller died after a commit",
        "controller died before a commit",
        "controller killed",
        "host cut from the controller",
        "host lost power",
        "hosts cut apart",
        "hypervisor killed",
        "session broken",
    ];
    for kind in kinds {
        assert!(
            faults.get(kind).is_some_and(|&times| times > SEEDS / 10),
            "{kind} came {:?} times",
            faults.get(kind)
        );
    }
}

#[test]
fn without_faults_every_move_arrives_or_is_refused_for_a_reason_of_people() {
    for seed in 0..100 {
        let options = Options {
            faults: false,
            ..Options::default()
        };
        let outcome = run(seed, options);
        assert_eq!(outcome.broken, None, "seed {seed}");
    }
}

#[test]
fn a_seed_is_the_same_history_each_time() {
    for seed in 0..20 {
        let options = Options {
            trace: true,
            ..Options::default()
        };
        let (first, second) = (run(seed, options), run(seed, options));
        assert_eq!(first.hash, second.hash, "seed {seed}");
        assert_eq!(first.trace, second.trace, "seed {seed}");
    }
}
