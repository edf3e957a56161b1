//! Durable creations a second, in batches of 1, 16 and 64 requests, beside a bare fsync on the same disk in the same run:
//! `cargo run --release -p store --example commit_rate [DIRECTORY]` (not on tmpfs). Each request writes what creating a
//! VM writes: seven rows.

use std::{
    error::Error,
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use store::Store;

#[path = "../tests/support/mod.rs"]
mod support;

use support::{base, creation, put};

const ROUNDS: usize = 200;
const BATCHES: [usize; 3] = [1, 16, 64];

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let parent = std::env::args_os()
        .nth(1)
        .map_or_else(|| PathBuf::from("."), PathBuf::from);
    let dir = tempfile::tempdir_in(parent)?;
    let (store, _) = Store::open(&dir.path().join("store")).await?;
    store.commit(put(base())).await?;
    let mut bare = File::create(dir.path().join("bare"))?;
    let mut syncs = Vec::with_capacity(ROUNDS * BATCHES.len());
    let mut commits = BATCHES.map(|_| Vec::with_capacity(ROUNDS));
    let mut sequence = 0;
    for _ in 0..ROUNDS {
        for (size, times) in BATCHES.iter().zip(&mut commits) {
            // Interleaved, so that whatever else the machine does falls on all arms alike.
            syncs.push(fsync(&mut bare)?);
            let mut rows = Vec::with_capacity(size * 7);
            for _ in 0..*size {
                sequence += 1;
                rows.extend(creation(u128::from(sequence) << 8, sequence));
            }
            let batch = put(rows);
            let start = Instant::now();
            store.commit(batch).await?;
            times.push(start.elapsed());
        }
    }
    report("bare: append 4 KiB and fdatasync", 1, &mut syncs);
    for (size, times) in BATCHES.iter().zip(&mut commits) {
        report(&format!("store: commits of {size} requests"), *size, times);
    }
    drop(store);
    reopened(&dir.path().join("store")).await
}

fn fsync(file: &mut File) -> Result<Duration, std::io::Error> {
    let start = Instant::now();
    file.write_all(&[7; 4096])?;
    file.sync_data()?;
    Ok(start.elapsed())
}

fn report(what: &str, requests: usize, times: &mut [Duration]) {
    times.sort_unstable();
    let at = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1e3;
    let per_second = requests as f64 * 1e3 / at(50);
    println!(
        "{what:<36} {per_second:>8.0} requests/s   median {:>7.3} ms   p99 {:>7.3} ms",
        at(50),
        at(99)
    );
}

async fn reopened(dir: &Path) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    let (_store, loaded) = Store::open(dir).await?;
    let took = start.elapsed().as_secs_f64();
    let vms = loaded
        .rows
        .iter()
        .filter(|row| matches!(row, model::Row::Vm(_)))
        .count();
    println!(
        "reopened and loaded {vms} VMs, {} rows, in {took:.2} s",
        loaded.rows.len()
    );
    Ok(())
}
