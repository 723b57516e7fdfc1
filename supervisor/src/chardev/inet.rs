//! Host names of TCP sockets. The C library's resolver would load plug-ins and talk to servers, so that only what needs
//! neither is known: numbers, `localhost`, and the names in /etc/hosts.

use std::io::{Error, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const HOSTS: &str = "/etc/hosts";

/// The addresses of a host; an empty name is every address of this one.
///
/// # Errors
/// The name is not known here.
pub fn resolve(host: &str, port: u16) -> std::io::Result<Vec<SocketAddr>> {
    let found = match host {
        "" => vec![Ipv4Addr::UNSPECIFIED.into()],
        "localhost" => vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
        _ => match host.parse::<IpAddr>() {
            Ok(address) => vec![address],
            Err(_) => in_hosts(&std::fs::read_to_string(HOSTS).unwrap_or_default(), host),
        },
    };
    if found.is_empty() {
        let problem = format!("the host is neither a numeric address nor localhost nor in {HOSTS}");
        return Err(Error::new(ErrorKind::NotFound, problem));
    }
    Ok(found
        .into_iter()
        .map(|address| SocketAddr::new(address, port))
        .collect())
}

/// The addresses that a hosts file gives a name.
fn in_hosts(file: &str, host: &str) -> Vec<IpAddr> {
    let line = |line: &str| {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let address = words.next()?.parse().ok()?;
        words.any(|name| name.eq_ignore_ascii_case(host)).then_some(address)
    };
    file.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_localhost_and_the_hosts_file_are_known() {
        assert_eq!(resolve("::1", 7).unwrap(), ["[::1]:7".parse().unwrap()]);
        assert_eq!(resolve("localhost", 7).unwrap()[0], "127.0.0.1:7".parse().unwrap());
        let file = "# 10.0.0.9 web\n10.0.0.1\tWeb web.example # db\nbroken web\n";
        assert_eq!(in_hosts(file, "web"), [IpAddr::from([10, 0, 0, 1])]);
        assert!(in_hosts(file, "db").is_empty());
        assert!(resolve("nosuch.invalid", 7).is_err());
    }
}
