//! `godwit up`: a controller and an agent on this machine, in one process. The first start joins the two by itself.

use std::path::{Path, PathBuf};

use ::controller::{Handle, StateDir};
use clap::Args;
use identity::{Address, ApiToken, JoinTarget};
use model::{
    Actor, HostId, Millis, Name,
    name::Reference,
    query::{Query, View},
};

use super::{
    agent::{self, HostFlags, Places},
    controller::{self, ListenFlags, NetworkFlags},
};
use crate::{
    cli::Common,
    commands::STATE,
    exit::{Exit, Failure},
    out, shutdown,
};

/// How long the token is valid with which this machine's own agent joins.
const TOKEN_VALID: Millis = Millis::seconds(60);

/// Run a controller and an agent on this machine.
#[derive(Args, Debug)]
pub(crate) struct Up {
    #[command(flatten)]
    listen: ListenFlags,
    #[command(flatten)]
    network: NetworkFlags,
    #[command(flatten)]
    host: HostFlags,
    /// Name of this host; without it, the machine's host name
    #[arg(long, value_name = "NAME")]
    host_name: Option<Name>,
}

impl Up {
    pub(crate) async fn run(self, common: &Common) -> Result<(), Failure> {
        let state = std::path::absolute(common.state.as_deref().unwrap_or(Path::new(STATE)));
        let state = state.map_err(|error| Failure::of(Exit::Usage, &error))?;
        agent::open_directory(&state)?;
        let run = if common.state.is_some() {
            state.join("run")
        } else {
            PathBuf::from("/run/godwit")
        };
        let places = Places {
            state: state.join("agent"),
            run,
            pool: state.join("pool"),
        };
        let asked = shutdown::asked_for()?;
        let flags = controller::Controller {
            listen: self.listen,
            network: self.network,
        };
        let home = state.join("controller");
        let (controller, handle) = controller::start(&flags, home.clone()).await?;
        let (gateway, prefix) = flags.network.gateway_with_prefix();
        let config = self
            .host
            .config(places, controller::outward_address(), Some((gateway.into(), prefix)))?;
        let name = self.host_name.unwrap_or_else(agent::own_name);
        let work = async {
            if !config.has_joined() {
                let address = Address {
                    host: reached_at(controller.api_address()).to_string(),
                    port: controller.api_address().port(),
                };
                let target = token(&handle, &home, address).await?;
                agent::join(&config, Some(&target), &name).await?;
            }
            let started = agent::start(config).await?;
            agent::ready(&started, &known_as(&handle, &home, started.host()).await?)?;
            out::note(&format!(
                "to use it, in another terminal: godwit{} vm list",
                state_flag(common)
            ));
            started.run().await;
            Ok(())
        };
        tokio::select! {
            ended = work => ended,
            () = asked => {
                // VMs and migrations go on.
                controller.stop().await;
                Ok(())
            }
        }
    }
}

/// Where this machine reaches a port of its own.
fn reached_at(listening: std::net::SocketAddr) -> std::net::IpAddr {
    match listening.ip() {
        ip if ip.is_unspecified() => std::net::Ipv4Addr::LOCALHOST.into(),
        ip => ip,
    }
}

fn state_flag(common: &Common) -> String {
    common
        .state
        .as_ref()
        .map(|state| format!(" --state {}", state.display()))
        .unwrap_or_default()
}

/// The first administrator, in whose name this machine is set up.
fn administrator(handle: &Handle, home: &Path) -> Result<Actor, Failure> {
    let first =
        ApiToken::read_file(&StateDir::new(home).admin_token()).map_err(|error| Failure::of(Exit::Failed, &error))?;
    Ok(handle.authenticate(&first.reveal())?)
}

/// The name that the cell gave this host; it may have been renamed since.
async fn known_as(handle: &Handle, home: &Path, host: HostId) -> Result<Name, Failure> {
    let query = Query::Host(Reference::Id(host.0));
    match handle.read(administrator(handle, home)?, query).await? {
        View::Host(view) => Ok(view.host.name),
        _ => Err(Failure::new(
            Exit::Failed,
            format!("the controller does not know this host, {host}"),
        )),
    }
}

/// A token for this machine's own agent.
async fn token(handle: &Handle, home: &Path, address: Address) -> Result<JoinTarget, Failure> {
    let actor = administrator(handle, home)?;
    let text = handle.add_join_token(actor, TOKEN_VALID).await?;
    let token = text
        .parse()
        .map_err(|error: identity::JoinTokenError| Failure::of(Exit::Failed, &error))?;
    Ok(JoinTarget { token, address })
}
