//! Every history of a hand-over with few faults: all orders of all steps, each state visited once.

mod pair;

use std::{
    collections::{BTreeSet, VecDeque},
    fmt,
    hash::{DefaultHasher, Hasher},
};

use pair::{Budget, Pair};

/// Every how many states the rest without faults is followed to its end.
const HEALED_EVERY: u64 = 31;

/// Hashes what is written to it.
struct Hashed(DefaultHasher);

impl fmt::Write for Hashed {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write(text.as_bytes());
        Ok(())
    }
}

fn fingerprint(pair: &Pair) -> u64 {
    let mut hashed = Hashed(DefaultHasher::new());
    pair.describe(&mut hashed).expect("hashing does not fail");
    hashed.0.finish()
}

/// Follows every choice from every state that can be reached, and returns how many states there are.
fn explore(run: bool, budget: Budget) -> Result<u64, String> {
    let first = Pair::new(run, budget, None);
    let mut seen = BTreeSet::from([fingerprint(&first)]);
    let mut queue = VecDeque::from([first]);
    let mut states = 0;
    while let Some(pair) = queue.pop_front() {
        if states % HEALED_EVERY == 0
            && let Err(what) = pair.clone().heal()
        {
            return Err(format!("{what}, from {pair:?}"));
        }
        states += 1;
        for choice in pair.choices() {
            let mut next = pair.clone();
            if let Err(what) = next.take(choice) {
                return Err(format!("{what}, by {choice:?} from {pair:?}"));
            }
            if seen.insert(fingerprint(&next)) {
                queue.push_back(next);
            }
        }
    }
    Ok(states)
}

const NONE: Budget = Budget {
    losses: 0,
    duplicates: 0,
    crashes: 0,
    outages: 0,
    kills: 0,
    breaks: 0,
    cancels: 0,
    cuts: 0,
};

#[test]
fn every_order_with_two_lost_or_repeated_words_and_a_dead_agent_is_safe() {
    let states = explore(
        true,
        Budget {
            losses: 1,
            duplicates: 1,
            crashes: 1,
            ..NONE
        },
    )
    .expect("each promise holds");
    eprintln!("{states} states");
    assert!(states > 10_000, "only {states} states: the model no longer moves");
}

#[test]
fn every_order_with_a_dead_agent_and_a_reboot_is_safe() {
    let states = explore(
        true,
        Budget {
            crashes: 1,
            outages: 1,
            ..NONE
        },
    )
    .expect("each promise holds");
    eprintln!("{states} states");
    assert!(states > 10_000, "only {states} states: the model no longer moves");
}

#[test]
fn every_order_with_a_lost_connection_and_a_dead_agent_is_safe() {
    let states = explore(
        true,
        Budget {
            cuts: 1,
            crashes: 1,
            ..NONE
        },
    )
    .expect("each promise holds");
    eprintln!("{states} states");
    assert!(states > 10_000, "only {states} states: the model no longer moves");
}

#[test]
fn every_order_with_a_broken_stream_and_a_cancel_is_safe() {
    for run in [true, false] {
        let states = explore(
            run,
            Budget {
                breaks: 1,
                cancels: 1,
                kills: 1,
                ..NONE
            },
        )
        .expect("each promise holds");
        eprintln!("{states} states, run={run}");
        assert!(states > 1_000, "only {states} states: the model no longer moves");
    }
}
