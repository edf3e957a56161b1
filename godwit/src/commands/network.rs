//! `godwit network`: what VMs are attached to.

use clap::Subcommand;
use model::query::NetworkView;

use super::{Heading, Session, addressing::Told};
use crate::exit::Failure;

/// What can be done with networks.
#[derive(Subcommand, Debug)]
pub(crate) enum Network {
    /// List networks
    List,
    /// Say what its guests are told, and how: DHCP, IPv6, name servers, metadata
    Addressing(Box<Told>),
}

impl Network {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::List => session.list("/v1/networks", None, HEADING, row).await,
            Self::Addressing(told) => told.run(session).await,
        }
    }
}

const HEADING: Heading = Heading {
    narrow: &["NAME", "SUBNETS", "ADDRESSES USED", "MTU"],
    wide: &["ID"],
};

/// Those in use, and those that nobody has and nobody gets yet.
fn addresses(used: u64, resting: u64) -> String {
    match (used.saturating_sub(resting), resting) {
        (used, 0) => used.to_string(),
        (used, resting) => format!("{used} ({resting} resting)"),
    }
}

fn row(view: NetworkView, wide: bool) -> Vec<String> {
    let subnets = view
        .subnets
        .iter()
        .map(|subnet| format!("{}/{}", subnet.address, subnet.prefix))
        .collect::<Vec<_>>();
    let mut row = vec![
        view.network.name.to_string(),
        subnets.join(","),
        addresses(view.addresses_used, view.addresses_resting),
        view.network.mtu.to_string(),
    ];
    if wide {
        row.push(view.network.id.to_string());
    }
    row
}
