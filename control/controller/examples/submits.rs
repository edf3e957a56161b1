//! How many durable requests a second the loop takes, with the embedded store: `submits DIRECTORY [CLIENTS] [REQUESTS]`.
//!
//! Each request is one row, one notice and the reply after its commit. The directory must be on a real disk; a bare fsync of
//! the same disk is measured beside it, for a commit costs at least one.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a measurement that stops when something is wrong"
)]

use std::{
    io::Write as _,
    path::Path,
    time::{Duration, Instant},
};

use controller::{Config, Controller, DefaultNetwork, SubmitOptions};
use identity::NodeKey;
use model::{Command, Millis, name::Reference};
use wire::{JoinRequest, Ticket};

type Failure = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().expect("a directory on a real disk");
    let clients: usize = arguments.next().map_or(Ok(64), |text| text.parse())?;
    let requests: usize = arguments.next().map_or(Ok(20_000), |text| text.parse())?;
    let fsync = fsync_median(Path::new(&directory))?;
    let state = tempfile::tempdir_in(&directory)?;
    let (controller, handle) = Controller::start(config(state.path())?).await?;
    let token = std::fs::read_to_string(state.path().join("admin.token"))?;
    let admin = handle.authenticate(token.trim())?;
    let join_token = handle.add_join_token(admin.clone(), Millis::seconds(3600)).await?;
    let request = JoinRequest {
        token: Ticket::new(join_token),
        csr_pem: identity::pem("CERTIFICATE REQUEST", &NodeKey::generate()?.request()?),
        name: "h1".parse()?,
    };
    let host = handle.join(request).await?.host;

    let begun = Instant::now();
    let tasks: Vec<_> = (0..clients)
        .map(|client| {
            let (handle, admin) = (handle.clone(), admin.clone());
            tokio::spawn(async move {
                let mut times = Vec::new();
                for n in 0..requests / clients {
                    let command = Command::SetSchedulable {
                        host: Reference::Id(host.0),
                        schedulable: (n + client) % 2 == 0,
                    };
                    let asked = Instant::now();
                    handle.submit(admin.clone(), command, SubmitOptions::default()).await?;
                    times.push(asked.elapsed());
                }
                Ok::<_, Failure>(times)
            })
        })
        .collect();
    let mut times = Vec::new();
    for task in tasks {
        times.extend(task.await??);
    }
    let took = begun.elapsed();
    times.sort_unstable();
    let rate = f64::from(u32::try_from(times.len())?) / took.as_secs_f64();
    println!(
        "{} requests of {clients} clients: {rate:.0}/s, median {:?}, p99 {:?}; bare fsync median {fsync:?}",
        times.len(),
        times[times.len() / 2],
        times[times.len() * 99 / 100],
    );
    let metrics = handle.metrics(&admin);
    let totals = metrics
        .lines()
        .filter(|line| line.contains("commit_seconds_sum") || line.contains("commit_seconds_count"));
    totals.for_each(|line| println!("{line}"));
    controller.stop().await;
    Ok(())
}

fn config(state: &Path) -> Result<Config, std::net::AddrParseError> {
    Ok(Config {
        state: state.to_owned(),
        api_listen: "127.0.0.1:0".parse()?,
        agents_listen: "127.0.0.1:0".parse()?,
        names: vec!["127.0.0.1".to_owned()],
        network: DefaultNetwork {
            address: "10.91.0.0".parse()?,
            prefix: 24,
            gateway: None,
            first: "10.91.0.10".parse()?,
            last: "10.91.0.99".parse()?,
        },
        telemetry_bytes_max: Config::TELEMETRY_BYTES,
    })
}

/// Median of appending 4 KiB and waiting for the disk.
fn fsync_median(directory: &Path) -> std::io::Result<Duration> {
    let mut file = tempfile::tempfile_in(directory)?;
    let mut times = Vec::with_capacity(200);
    for _ in 0..200 {
        let begun = Instant::now();
        file.write_all(&[1; 4096])?;
        file.sync_data()?;
        times.push(begun.elapsed());
    }
    times.sort_unstable();
    Ok(times[times.len() / 2])
}
