//! How long a port takes to open, with its announcement: `cargo run --release -p network --example open_latency`.
//! As root; everything happens in a network namespace that ends with the program.
#![allow(unsafe_code)] // one call, see there

use std::{
    error::Error,
    fmt::Debug,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use model::{Mac, PortId};
use network::{Announcement, BridgeSpec, Network, Tap};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use uuid::Uuid;

const ROUNDS: usize = 2000;

fn main() -> Result<(), Box<dyn Error>> {
    // SAFETY: only the network namespace is unshared, and this is the only thread.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("run as root");
    let network = Network::open()?;
    let name: network::InterfaceName = "br0".parse()?;
    let spec = BridgeSpec {
        name: name.clone(),
        mtu: 1500,
        uplink: None,
        gateway: None,
    };
    report("ensure a bridge that is there", || {
        timed(|| network.ensure_bridge(&spec))
    });
    for taps in [1u32, 100, 500] {
        let others: Vec<Tap> = (1..taps)
            .map(|n| network.create_tap(PortId(Uuid::from_u128(u128::from(n) << 8)), &name))
            .collect::<Result<_, _>>()?;
        for tap in &others {
            network.open_port(&tap.port, &Announcement::new(Mac([2, 0, 0, 0, 1, 1]), &[]))?;
        }
        let tap = network.create_tap(PortId(Uuid::from_u128(1)), &name)?;
        let announcement = Announcement::new(Mac([2, 0, 0, 0, 0, 1]), &[Ipv4Addr::new(10, 0, 0, 1).into()]);
        println!("{taps} ports on the bridge:");
        let round = |timed_open: bool| {
            let open = timed(|| network.open_port(&tap.port, &announcement));
            let block = timed(|| network.block_port(&tap.port));
            if timed_open { open } else { block }
        };
        report("  open a port, announcing a MAC and an address", || round(true));
        report("  block a port", || round(false));
        report("  find a port", || {
            timed(|| network.find_port(PortId(Uuid::from_u128(1))))
        });
        report("  list all ports", || timed(|| network.ports()));
        let cycle = PortId(Uuid::from_u128(2));
        report("  make a tap", || timed(|| network.create_tap(cycle, &name)));
    }
    Ok(())
}

fn timed<T, E: Debug>(work: impl FnOnce() -> Result<T, E>) -> Duration {
    let start = Instant::now();
    let made = work();
    let took = start.elapsed();
    drop(made.expect("the measured call succeeds"));
    took
}

fn report(what: &str, mut round: impl FnMut() -> Duration) {
    let rounds = if what.contains("make") { ROUNDS / 20 } else { ROUNDS };
    let mut times: Vec<Duration> = (0..rounds).map(|_| round()).collect();
    times.sort_unstable();
    let at = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1e6;
    println!(
        "{what:<50} median {:>8.1} us   p99 {:>8.1} us   worst {:>8.1} us",
        at(50),
        at(99),
        at(100)
    );
}
