//! `godwit controller`: decides and remembers; people, tools and agents connect to it.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    str::FromStr,
};

use ::controller::{Config, DefaultNetwork, Handle};
use clap::Args;
use identity::Address;

use crate::{
    cli::Common,
    commands::{STATE, agent::BRIDGE},
    exit::{Exit, Failure},
    notify,
    out::{self, units},
    shutdown,
};

/// An address range and its prefix: `10.91.0.0/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range4 {
    address: Ipv4Addr,
    prefix: u8,
}

impl FromStr for Range4 {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "give an address and a prefix, such as 10.91.0.0/24".to_owned();
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let prefix = prefix.parse().ok().filter(|prefix| (8..=30).contains(prefix));
        Ok(Self {
            address: address.parse().map_err(|_| wrong())?,
            prefix: prefix.ok_or("the prefix is from /8 to /30")?,
        })
    }
}

/// The first and the last of some addresses: `10.91.0.50-10.91.0.250`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span4 {
    first: Ipv4Addr,
    last: Ipv4Addr,
}

impl FromStr for Span4 {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "give two addresses in order, such as 10.91.0.50-10.91.0.250".to_owned();
        let (first, last) = text.split_once('-').ok_or_else(wrong)?;
        let (first, last) = (first.parse().map_err(|_| wrong())?, last.parse().map_err(|_| wrong())?);
        if first <= last {
            Ok(Self { first, last })
        } else {
            Err(wrong())
        }
    }
}

/// The network `default`, as the first start makes it.
#[derive(Args, Debug, Clone)]
pub(crate) struct NetworkFlags {
    /// Addresses of the network `default`; used at the first start only
    #[arg(long, default_value = "10.91.0.0/24", value_name = "ADDRESS/PREFIX")]
    subnet: Range4,
    /// Its way out; without it, the first address of the default subnet
    #[arg(long = "gateway", id = "network-gateway", value_name = "ADDRESS")]
    gateway: Option<Ipv4Addr>,
    /// Addresses for VMs; without it, all of the subnet from the tenth on
    #[arg(long, value_name = "FIRST-LAST")]
    range: Option<Span4>,
}

impl NetworkFlags {
    fn network(&self) -> DefaultNetwork {
        let Range4 { address, prefix } = self.subnet;
        let size = 1u32 << (32 - u32::from(prefix));
        let nth = |n: u32| Ipv4Addr::from_bits(address.to_bits().saturating_add(n));
        // A /30 has two addresses in all: the gateway's and one for a VM.
        let first = if size > 16 { 10 } else { 2 };
        let range = self.range.unwrap_or(Span4 {
            first: nth(first),
            last: nth(size - 2),
        });
        DefaultNetwork {
            address,
            prefix,
            gateway: Some(self.gateway()),
            first: range.first,
            last: range.last,
        }
    }

    /// The way out, with the prefix of its network.
    pub(crate) fn gateway_with_prefix(&self) -> (Ipv4Addr, u8) {
        (self.gateway(), self.subnet.prefix)
    }

    fn gateway(&self) -> Ipv4Addr {
        self.gateway
            .unwrap_or(Ipv4Addr::from_bits(self.subnet.address.to_bits().saturating_add(1)))
    }
}

/// Where a controller listens, and under which names it is reached.
#[derive(Args, Debug, Clone)]
pub(crate) struct ListenFlags {
    /// Where people, tools and joining hosts connect; port 0 takes a free one
    #[arg(long, default_value = "0.0.0.0:7443", value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
    /// Where agents connect; port 0 takes a free one
    #[arg(long, default_value = "0.0.0.0:7444", value_name = "ADDRESS:PORT")]
    agent_listen: SocketAddr,
    /// DNS name or address of this machine for others; the first is told to hosts. Without it, its address and host name
    #[arg(long = "name", id = "controller-name", value_name = "NAME")]
    names: Vec<String>,
}

impl ListenFlags {
    /// The names under which the controller is reached, and its certificate valid. The first is the one that others are told.
    fn names(&self) -> Vec<String> {
        let mut names = self.names.clone();
        if names.is_empty() {
            let own = match self.listen.ip() {
                ip if ip.is_unspecified() => outward_address(),
                ip => ip,
            };
            names.push(own.to_string());
        }
        let also = ["127.0.0.1".to_owned(), "localhost".to_owned()]
            .into_iter()
            .chain(host_name());
        for name in also {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}

/// Where a server's flags may be written down. The file is read before the command line is ([`crate::config`]).
#[derive(Args, Debug, Clone)]
pub(crate) struct ConfigFlag {
    /// A TOML file with this command's flags as keys; what is typed wins over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// What is kept of what hosts and VMs use.
#[derive(Args, Debug, Clone)]
pub(crate) struct FiguresFlags {
    /// Most that the file with a day of figures takes: 92 KiB for each VM, host, pool of a host and uplink of a host
    #[arg(long, default_value = "512M", value_parser = units::bytes, value_name = "SIZE")]
    figures_max: u64,
}

/// Run the controller.
#[derive(Args, Debug)]
pub(crate) struct Controller {
    #[command(flatten)]
    pub(crate) file: ConfigFlag,
    #[command(flatten)]
    pub(crate) listen: ListenFlags,
    #[command(flatten)]
    pub(crate) network: NetworkFlags,
    #[command(flatten)]
    pub(crate) figures: FiguresFlags,
}

impl Controller {
    pub(crate) async fn run(self, common: &Common) -> Result<(), Failure> {
        let state = common
            .state
            .clone()
            .unwrap_or_else(|| Path::new(STATE).join("controller"));
        let asked = shutdown::asked_for()?;
        let (controller, _) = start(&self, state).await?;
        notify::ready();
        serve_until(controller, asked).await
    }
}

/// Starts a controller that serves its interface, and says so.
pub(crate) async fn start(flags: &Controller, state: PathBuf) -> Result<(::controller::Controller, Handle), Failure> {
    let names = flags.listen.names();
    let config = Config {
        state,
        api_listen: flags.listen.listen,
        agents_listen: flags.listen.agent_listen,
        names: names.clone(),
        network: flags.network.network(),
        telemetry_bytes_max: flags.figures.figures_max,
    };
    let started = ::controller::Controller::start(config).await;
    let (mut controller, handle) = started.map_err(|error| Failure::of(Exit::Failed, &error))?;
    controller.serve_api(rest::router(handle.clone(), &names));
    let (api, agents) = (
        reached(controller.api_address(), &names),
        reached(controller.agents_address(), &names),
    );
    out::line(&format!("ready api=https://{api} agents={agents}"))?;
    warn_of_loopback(&api);
    Ok((controller, handle))
}

/// `HOST:PORT` at which others reach a port: its address, or where it listens on all of them the first name.
fn reached(listening: SocketAddr, names: &[String]) -> String {
    match names.first() {
        Some(name) if listening.ip().is_unspecified() => {
            let (host, port) = (name.clone(), listening.port());
            Address { host, port }.to_string()
        }
        _ => listening.to_string(),
    }
}

/// Serves until it is told to stop, or the controller ends by itself.
pub(crate) async fn serve_until(
    mut controller: ::controller::Controller,
    asked: impl Future<Output = ()>,
) -> Result<(), Failure> {
    tokio::select! {
        () = asked => {
            controller.stop().await;
            Ok(())
        }
        ended = controller.ended() => {
            let message = format!("the controller ended by itself: {}", why(ended));
            Err(Failure::new(Exit::Failed, message).hint("start it again; what was accepted is kept. The log says more"))
        }
    }
}

fn why(ended: ::controller::Ended) -> &'static str {
    match ended {
        ::controller::Ended::Stopped => "it was told to stop",
        ::controller::Ended::Deposed => "another controller leads now",
        ::controller::Ended::Failed => "it met a bug",
    }
}

/// The address by which this machine reaches others: that of the route to an address that nobody has (RFC 5737), or without such a
/// route that on the first network at hand. Nothing is sent. Without any network it is the loopback's.
pub(crate) fn outward_address() -> IpAddr {
    let far = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), 9));
    let near = || {
        let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
        let neighbours = neighbours(&routes).map(|neighbour| SocketAddr::from((neighbour, 9)));
        neighbours.filter_map(address_towards).next()
    };
    address_towards(far).or_else(near).unwrap_or(Ipv4Addr::LOCALHOST.into())
}

/// An address in each network that this machine is on, from the kernel's table of routes; not on the bridge of VMs.
fn neighbours(routes: &str) -> impl Iterator<Item = Ipv4Addr> {
    let networks = routes.lines().skip(1).filter_map(|line| {
        let mut words = line.split_whitespace();
        let (interface, network) = (words.next()?, words.next()?);
        let own = interface != "lo" && interface != BRIDGE;
        // As the kernel has it in memory: the first byte of the address is the last one of the number.
        let network = u32::from_str_radix(network, 16).ok().filter(|network| *network != 0)?;
        own.then(|| Ipv4Addr::from(network.to_le_bytes()))
    });
    networks.map(|network| Ipv4Addr::from_bits(network.to_bits().saturating_add(1)))
}

/// Says when others are told an address that is of use on this machine only.
fn warn_of_loopback(api: &str) {
    let told: Option<Address> = api.parse().ok();
    let ip = told.and_then(|told| told.host.parse::<IpAddr>().ok());
    if ip.is_some_and(|ip| ip.is_loopback()) {
        out::note(
            "other machines cannot reach that address: for hosts to join, start with --name and one of this machine",
        );
    }
}

/// The address of this machine on the way to another. Nothing is sent.
pub(crate) fn address_towards(other: SocketAddr) -> Option<IpAddr> {
    let any: SocketAddr = if other.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(other).ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

/// This machine's name, where it is a DNS name.
pub(crate) fn host_name() -> Option<String> {
    let name = rustix::system::uname().nodename().to_str().ok()?.to_ascii_lowercase();
    rustls::pki_types::DnsName::try_from(name.as_str()).ok()?;
    Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_way_out_has_an_address_on_its_own_network() {
        let routes = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
godwit0\t00005B0A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
eth0\t00004D0A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
torn
";
        let found: Vec<_> = neighbours(routes).collect();
        assert_eq!(found, [Ipv4Addr::new(10, 77, 0, 1)]);
        assert_eq!(neighbours("").count(), 0);
    }

    #[test]
    fn a_network_has_a_gateway_and_room_for_vms() {
        for (subnet, first, last) in [
            ("10.91.0.0/24", "10.91.0.10", "10.91.0.254"),
            ("10.0.0.0/30", "10.0.0.2", "10.0.0.2"),
        ] {
            let flags = NetworkFlags {
                subnet: subnet.parse().unwrap(),
                gateway: None,
                range: None,
            };
            let network = flags.network();
            assert_eq!(
                (network.first.to_string(), network.last.to_string()),
                (first.to_owned(), last.to_owned())
            );
            assert!(network.gateway.unwrap() < network.first);
        }
    }
}
