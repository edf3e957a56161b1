//! `godwit agent`: runs VMs on this host as the controller says.

use std::{
    net::{IpAddr, SocketAddr, ToSocketAddrs as _},
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use ::agent::{AgentConfig, JoinError, StartError};
use clap::Args;
use identity::JoinTarget;
use model::Name;

use super::controller::{ConfigFlag, address_towards, host_name};
use crate::{
    cli::Common,
    commands::STATE,
    exit::{Exit, Failure},
    notify, out, shutdown,
};

/// The bridge of VMs, where no other is named.
pub(crate) const BRIDGE: &str = "godwit0";

/// A pool: its name and its directory.
#[derive(Clone, Debug)]
pub(crate) struct PoolFlag {
    name: Name,
    directory: PathBuf,
}

impl PoolFlag {
    /// Its name and its directory, which must be there: where a file system is not mounted yet, a new directory would be a pool of this
    /// host's own under the name of a shared one.
    fn there(&self) -> Result<(Name, PathBuf), Failure> {
        if self.directory.is_dir() {
            return Ok((self.name.clone(), self.directory.clone()));
        }
        let shown = self.directory.display();
        let message = format!("pool {}: there is no directory {shown}", self.name);
        let hint = format!("mount it if it is to be mounted; else make it: mkdir -p {shown}");
        Err(Failure::new(Exit::Failed, message).hint(hint))
    }

    /// Its directory.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }
}

impl std::str::FromStr for PoolFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, directory) = text
            .split_once('=')
            .ok_or("give NAME=DIR, such as shared=/srv/godwit")?;
        let name = name
            .parse()
            .map_err(|error: model::name::NameError| error.to_string())?;
        if !Path::new(directory).is_absolute() {
            return Err("the directory is not an absolute path".to_owned());
        }
        Ok(Self {
            name,
            directory: directory.into(),
        })
    }
}

/// An address and the length of its network's prefix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GatewayFlag(IpAddr, u8);

impl std::str::FromStr for GatewayFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "give an address and a prefix, such as 10.91.0.1/24".to_owned();
        let (ip, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let ip: IpAddr = ip.parse().map_err(|_| wrong())?;
        let most = if ip.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.parse().ok().filter(|prefix| *prefix <= most).ok_or_else(wrong)?;
        Ok(Self(ip, prefix))
    }
}

/// What an agent is told of its host, alone or beside a controller.
#[derive(Args, Debug, Clone)]
pub(crate) struct HostFlags {
    /// A storage pool; may be given several times. Hosts that see the same files share it
    #[arg(long = "pool", value_name = "NAME=DIR")]
    pools: Vec<PoolFlag>,
    /// Where sockets are; without it, /run/godwit, or with `up --state DIR` DIR/run
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// The bridge of VMs; made where it is missing
    #[arg(long, default_value = BRIDGE, value_name = "NAME")]
    bridge: String,
    /// The interface by which the bridge reaches other hosts
    #[arg(long, value_name = "INTERFACE")]
    uplink: Option<String>,
    /// Largest packet on the bridge, bytes
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(576..=65_535), value_name = "BYTES")]
    mtu: u32,
    /// QEMU: a program, or a directory with an unpacked one
    #[arg(long, default_value = "qemu-system-x86_64", value_name = "PATH")]
    qemu: PathBuf,
}

/// Where things are that depend on how the agent was started.
pub(crate) struct Places {
    pub(crate) state: PathBuf,
    pub(crate) run: PathBuf,
    pub(crate) pool: PathBuf,
}

impl HostFlags {
    /// The agent's configuration.
    pub(crate) fn config(
        &self,
        places: Places,
        address: IpAddr,
        gateway: Option<(IpAddr, u8)>,
    ) -> Result<AgentConfig, Failure> {
        let pools = if self.pools.is_empty() {
            open_directory(&places.pool)?;
            let local = "local".parse().expect("`local` is a name");
            vec![(local, places.pool)]
        } else {
            self.pools.iter().map(PoolFlag::there).collect::<Result<_, _>>()?
        };
        let interface = |name: &String| {
            name.parse::<network::InterfaceName>()
                .map_err(|error| Failure::of(Exit::Usage, &error))
        };
        if let Some(uplink) = self.uplink.as_ref().filter(|uplink| !is_interface(uplink)) {
            let message = format!("there is no interface {uplink} to be the uplink");
            return Err(Failure::new(Exit::Failed, message).hint("`ip link` lists those that are there"));
        }
        Ok(AgentConfig {
            state_dir: places.state,
            run_dir: self.run_dir.clone().unwrap_or(places.run),
            address,
            pools,
            bridge: interface(&self.bridge)?,
            uplink: self.uplink.as_ref().map(interface).transpose()?,
            gateway: gateway.map(|(ip, prefix)| network::Gateway { ip, prefix }),
            mtu: self.mtu,
            qemu: self.qemu.clone(),
            // Whatever becomes of its file: an upgrade may replace it at any time.
            exe: "/proc/self/exe".into(),
        })
    }
}

fn is_interface(name: &str) -> bool {
    !name.contains('/') && Path::new("/sys/class/net").join(name).exists()
}

/// Makes a directory that VMs' users may pass through.
pub(crate) fn open_directory(path: &Path) -> Result<(), Failure> {
    if path.is_dir() {
        return Ok(());
    }
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o755).create(path);
    let made = made.and_then(|()| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o711)));
    made.map_err(|error| {
        Failure::new(Exit::Failed, format!("cannot make {}: {error}", path.display()))
            .hint("run as root, or give --state DIR")
    })
}

/// Run the agent of this host.
#[derive(Args, Debug)]
pub(crate) struct Agent {
    #[command(flatten)]
    pub(crate) file: ConfigFlag,
    /// Join the cell of this controller; does nothing on a host that has joined
    #[arg(long, value_name = "TOKEN@ADDRESS:PORT")]
    join: Option<JoinTarget>,
    /// Name that this host would like when it joins; without it, its host name
    #[arg(long, value_name = "NAME")]
    name: Option<Name>,
    /// Where other hosts reach this one; without it, the address by which the controller is reached
    #[arg(long, value_name = "ADDRESS")]
    address: Option<IpAddr>,
    /// An address of this host on the bridge
    #[arg(long, value_name = "ADDRESS/PREFIX")]
    gateway: Option<GatewayFlag>,
    #[command(flatten)]
    host: HostFlags,
}

impl Agent {
    pub(crate) async fn run(self, common: &Common) -> Result<(), Failure> {
        let base = Path::new(STATE);
        let places = Places {
            state: common.state.clone().unwrap_or_else(|| base.join("agent")),
            run: "/run/godwit".into(),
            pool: base.join("pool"),
        };
        let name = self.name.clone().unwrap_or_else(own_name);
        let asked = shutdown::asked_for()?;
        let gateway = self.gateway.map(|GatewayFlag(ip, prefix)| (ip, prefix));
        let mut config = self
            .host
            .config(places, self.address.unwrap_or(IpAddr::from([0, 0, 0, 0])), gateway)?;
        if self.address.is_none() {
            config.address = own_address(&config, self.join.as_ref())?;
        }
        let work = async {
            join(&config, self.join.as_ref(), &name).await?;
            let agent = start(config).await?;
            ready(&agent, &agent.name().cloned().unwrap_or(name))?;
            agent.run().await;
            Ok(())
        };
        tokio::select! {
            ended = work => ended,
            // VMs and migrations go on without it.
            () = asked => Ok(()),
        }
    }
}

/// Joins the cell, unless this host has; then a token is of use only where the host was removed since.
pub(crate) async fn join(config: &AgentConfig, target: Option<&JoinTarget>, name: &Name) -> Result<(), Failure> {
    let Some(target) = target else {
        return Ok(());
    };
    if config.has_joined() && !was_removed(config).await? {
        out::note("this host has joined already: --join is ignored");
        return Ok(());
    }
    let joined = ::agent::join(config, target, name)
        .await
        .map_err(|error| Failure::of(Exit::Failed, &error).hint(join_hint(&error)))?;
    tracing::info!(host = %joined.host, cluster = %joined.cluster, "joined");
    if let Some(given) = joined.name.filter(|given| given != name) {
        out::note(&format!("another host is called {name}: this one is {given}"));
    }
    Ok(())
}

/// Whether the cell no longer knows this host, which had joined it.
pub(crate) async fn was_removed(config: &AgentConfig) -> Result<bool, Failure> {
    let standing = ::agent::standing(config).await;
    let standing = standing.map_err(|error| Failure::of(Exit::Failed, &error))?;
    Ok(matches!(standing, ::agent::Standing::Removed(_)))
}

/// What mends a join that failed.
fn join_hint(error: &JoinError) -> String {
    match error {
        JoinError::Connect { address, .. } => {
            format!(
                "see that the controller runs and {address} is right (its port for clients, 7443 by default); the token is still good"
            )
        }
        JoinError::Leave(_) => "then start this agent again, with the same token".to_owned(),
        JoinError::State(_) | JoinError::Key(_) => {
            "then start it again; the token may be used up: godwit host add-token".to_owned()
        }
        JoinError::NotTheController { .. } | JoinError::Answer { .. } | JoinError::Refused(_) => {
            "a fresh token: godwit host add-token, on the controller".to_owned()
        }
    }
}

/// Starts the agent.
pub(crate) async fn start(config: AgentConfig) -> Result<::agent::Agent, Failure> {
    ::agent::Agent::start(config).await.map_err(|error| {
        let hint = match &error {
            StartError::Removed { .. } => {
                "to join again: godwit host add-token on the controller, then start this agent with --join and what it prints"
            }
            _ => "godwit doctor --for agent says what this host lacks",
        };
        Failure::of(Exit::Failed, &error).hint(hint)
    })
}

/// Says that the agent runs.
pub(crate) fn ready(agent: &::agent::Agent, name: &Name) -> Result<(), Failure> {
    out::line(&format!("ready host={name} id={}", agent.host()))?;
    notify::ready();
    Ok(())
}

/// The address of this host on the way to the controller.
fn own_address(config: &AgentConfig, target: Option<&JoinTarget>) -> Result<IpAddr, Failure> {
    let controller = match (config.membership(), target) {
        (Ok((membership, _)), _) => membership.controller,
        (Err(_), Some(target)) => target.address.to_string(),
        (Err(error), None) => return Err(Failure::of(Exit::Usage, &error)),
    };
    let found: Option<SocketAddr> = controller.to_socket_addrs().ok().and_then(|mut found| found.next());
    found.and_then(address_towards).ok_or_else(|| {
        Failure::new(Exit::Failed, format!("no route to the controller at {controller}"))
            .hint("give this host's address with --address")
    })
}

/// This machine's host name made a name: what it may not have is left out.
pub(crate) fn own_name() -> Name {
    let text = host_name().unwrap_or_default();
    let first = text.split('.').next().unwrap_or_default();
    let kept: String = first
        .chars()
        .filter(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '-')
        .take(63)
        .collect();
    let fallback = || "host".parse().expect("`host` is a name");
    kept.trim_matches('-').parse().unwrap_or_else(|_| fallback())
}
