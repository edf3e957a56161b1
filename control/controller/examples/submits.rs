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
    fs::File,
    io::Write as _,
    path::Path,
    time::{Duration, Instant},
};

use controller::{Config, Controller, DefaultNetwork, SubmitOptions};
use identity::NodeKey;
use model::{Command, Millis, name::Reference};
use wire::{JoinRequest, Ticket};

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().expect("a directory on a real disk");
    let clients: usize = arguments.next().map_or(64, |text| text.parse().unwrap());
    let requests: usize = arguments.next().map_or(20_000, |text| text.parse().unwrap());
    let fsync = fsync_median(Path::new(&directory));
    let state = tempfile::tempdir_in(&directory).unwrap();
    let (controller, handle) = Controller::start(config(state.path())).await.unwrap();
    let token = std::fs::read_to_string(state.path().join("admin.token")).unwrap();
    let admin = handle.authenticate(token.trim()).unwrap();
    let join_token = handle
        .add_join_token(admin.clone(), Millis::seconds(3600))
        .await
        .unwrap();
    let request = JoinRequest {
        token: Ticket::new(join_token),
        csr_pem: identity::pem("CERTIFICATE REQUEST", &NodeKey::generate().unwrap().request().unwrap()),
        name: "h1".parse().unwrap(),
    };
    let host = handle.join(request).await.unwrap().host;

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
                    handle
                        .submit(admin.clone(), command, SubmitOptions::default())
                        .await
                        .unwrap();
                    times.push(asked.elapsed());
                }
                times
            })
        })
        .collect();
    let mut times = Vec::new();
    for task in tasks {
        times.extend(task.await.unwrap());
    }
    let took = begun.elapsed();
    times.sort_unstable();
    let rate = f64::from(u32::try_from(times.len()).unwrap()) / took.as_secs_f64();
    println!(
        "{} requests of {clients} clients: {rate:.0}/s, median {:?}, p99 {:?}; bare fsync median {fsync:?}",
        times.len(),
        times[times.len() / 2],
        times[times.len() * 99 / 100],
    );
    let metrics = handle.metrics();
    let totals = metrics
        .lines()
        .filter(|line| line.contains("commit_seconds_sum") || line.contains("commit_seconds_count"));
    totals.for_each(|line| println!("{line}"));
    controller.stop().await;
}

fn config(state: &Path) -> Config {
    Config {
        state: state.to_owned(),
        api_listen: "127.0.0.1:0".parse().unwrap(),
        agents_listen: "127.0.0.1:0".parse().unwrap(),
        names: vec!["127.0.0.1".to_owned()],
        network: DefaultNetwork {
            address: "10.91.0.0".parse().unwrap(),
            prefix: 24,
            gateway: None,
            first: "10.91.0.10".parse().unwrap(),
            last: "10.91.0.99".parse().unwrap(),
        },
    }
}

/// Median of appending 4 KiB and waiting for the disk.
fn fsync_median(directory: &Path) -> Duration {
    let mut file = tempfile::tempfile_in(directory).unwrap();
    let once = |file: &mut File| {
        let begun = Instant::now();
        file.write_all(&[1; 4096]).unwrap();
        file.sync_data().unwrap();
        begun.elapsed()
    };
    let mut times: Vec<Duration> = (0..200).map(|_| once(&mut file)).collect();
    times.sort_unstable();
    times[times.len() / 2]
}
