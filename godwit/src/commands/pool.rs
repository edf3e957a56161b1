//! `godwit pool`: where volumes are stored.

use clap::Subcommand;
use model::{Pool as StoragePool, storage::PoolScope};

use super::{Heading, Session};
use crate::exit::Failure;

/// What can be done with pools.
#[derive(Subcommand, Debug)]
pub(crate) enum Pool {
    /// List pools
    List,
}

impl Pool {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let Self::List = self;
        session.list("/v1/pools", None, HEADING, row).await
    }
}

const HEADING: Heading = Heading {
    narrow: &["NAME", "SCOPE", "HOSTS"],
    wide: &["ID"],
};

fn row(pool: StoragePool, wide: bool) -> Vec<String> {
    let scope = match pool.scope() {
        PoolScope::Host => "host",
        PoolScope::Shared => "shared",
    };
    let mut row = vec![pool.name.to_string(), scope.to_owned(), pool.hosts.len().to_string()];
    if wide {
        row.push(pool.id.to_string());
    }
    row
}
