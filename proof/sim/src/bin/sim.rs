//! Runs seeds of the simulator: `sim --seeds N --from S`, or one with its trace: `sim --seed S`.

use std::{process::ExitCode, time::Instant};

use sim::{Options, run};

fn main() -> ExitCode {
    match arguments() {
        Ok((from, seeds, trace)) => all(from, seeds, trace),
        Err(what) => {
            eprintln!("{what}\nusage: sim [--seeds N] [--from S], or sim --seed S");
            ExitCode::from(2)
        }
    }
}

/// First seed, how many, and whether to print all that happens.
fn arguments() -> Result<(u64, u64, bool), String> {
    let (mut from, mut seeds, mut trace) = (0, 1_000, false);
    let mut given = std::env::args().skip(1);
    while let Some(option) = given.next() {
        let value = given.next().ok_or_else(|| format!("{option} needs a number"))?;
        let number: u64 = value
            .parse()
            .map_err(|_| format!("{option} needs a number, not {value}"))?;
        match option.as_str() {
            "--seeds" => seeds = number,
            "--from" => from = number,
            "--seed" => (from, seeds, trace) = (number, 1, true),
            _ => return Err(format!("{option} is not known")),
        }
    }
    Ok((from, seeds, trace))
}

fn all(from: u64, seeds: u64, trace: bool) -> ExitCode {
    let began = Instant::now();
    let (mut events, mut moved, mut rolled_back) = (0, 0, 0);
    for seed in from..from.saturating_add(seeds) {
        let outcome = run(
            seed,
            Options {
                trace,
                ..Options::default()
            },
        );
        for line in &outcome.trace {
            println!("{line}");
        }
        if let Some(broken) = outcome.broken {
            println!("seed {seed}: {broken}\nsee all that happened: sim --seed {seed}");
            return ExitCode::FAILURE;
        }
        events += outcome.events;
        moved += outcome.moved;
        rolled_back += outcome.rolled_back;
    }
    let minutes = began.elapsed().as_secs_f64() / 60.0;
    let rate = seeds as f64 / minutes;
    println!(
        "{seeds} seeds in order, {rate:.0} a minute: {events} events, {moved} moves arrived, {rolled_back} rolled back"
    );
    ExitCode::SUCCESS
}
