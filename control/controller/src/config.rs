//! What a controller process is told, and where it keeps what.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

/// What a controller process is told. Files and flags only bootstrap it; policy is state of the cell.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where all that must survive lies; see [`StateDir`]. Made (0700) when it is not there.
    pub state: PathBuf,
    /// Where people, tools and joining hosts connect. Port 0 takes a free one.
    pub api_listen: SocketAddr,
    /// Where agents connect. Port 0 takes a free one.
    pub agents_listen: SocketAddr,
    /// DNS names and addresses under which this machine is reached; the interface's certificate is for these. The first is the one
    /// that is told to hosts and written for clients.
    pub names: Vec<String>,
    /// The address range of the network `default`, used at the first start only.
    pub network: DefaultNetwork,
    /// Most bytes of the file that keeps a day of what hosts and VMs used: 92 KiB for each VM, host, pool of a host and uplink of a host.
    pub telemetry_bytes_max: u64,
}

impl Config {
    /// What [`Config::telemetry_bytes_max`] is unless people say otherwise: enough for 5,000 VMs and their hosts.
    pub const TELEMETRY_BYTES: u64 = 512 << 20;
}

/// The address range of the network `default`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DefaultNetwork {
    /// Address part: `10.91.0.0`.
    pub address: Ipv4Addr,
    /// Prefix length: 24.
    pub prefix: u8,
    /// The way out, if there is one.
    pub gateway: Option<Ipv4Addr>,
    /// First address given to VMs.
    pub first: Ipv4Addr,
    /// Last address given to VMs.
    pub last: Ipv4Addr,
}

/// The files of a state directory.
#[derive(Clone, Debug)]
pub struct StateDir(PathBuf);

impl StateDir {
    /// The files under `root`.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self(root.into())
    }

    /// The directory itself.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.0.clone()
    }

    /// The cluster's authority (0700).
    #[must_use]
    pub fn authority(&self) -> PathBuf {
        self.0.join("ca")
    }

    /// The durable world.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.0.join("store")
    }

    /// Blobs, each named by its digest, until the hosts that need them have fetched them.
    #[must_use]
    pub fn blobs(&self) -> PathBuf {
        self.0.join("blobs")
    }

    /// A day of what hosts and VMs used. It may be removed while no controller runs.
    #[must_use]
    pub fn telemetry(&self) -> PathBuf {
        self.0.join("telemetry.ring")
    }

    /// The first administrator's token (0600), written at the first start only.
    #[must_use]
    pub fn admin_token(&self) -> PathBuf {
        self.0.join("admin.token")
    }

    /// The authority's certificate, for clients.
    #[must_use]
    pub fn ca_certificate(&self) -> PathBuf {
        self.0.join("ca.pem")
    }

    /// How a client on this machine reaches the controller: a [`ClientFile`] in JSON.
    #[must_use]
    pub fn client(&self) -> PathBuf {
        self.0.join("client.json")
    }
}

/// How a client on the controller's machine reaches it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientFile {
    /// `https://HOST:PORT` of the interface.
    pub server: String,
    /// The file with the authority's certificate.
    pub ca: PathBuf,
    /// The file with the token.
    pub token_file: PathBuf,
}
