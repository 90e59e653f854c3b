-- A key store to try agent_key_request.py with, and the schema for your own.
-- Loads unchanged into SQLite, MySQL, MariaDB and PostgreSQL.

CREATE TABLE agent (
    id VARCHAR(8) NOT NULL PRIMARY KEY,
    name VARCHAR(128) NOT NULL UNIQUE,
    ip VARCHAR(64),
    agent_key VARCHAR(128) NOT NULL
);

CREATE INDEX agent_ip ON agent (ip);

INSERT INTO agent (id, name, ip, agent_key) VALUES
    ('001', 'my_agent', '192.168.1.100', 'ac575526e8bbcddf6654e5aa0a39fa60a0020e5d34ed1370916368bdaf5f0c71'),
    ('002', 'laptop-anywhere', 'any', '5b1e64a0d3f7c29e8d40b6f1a3c85e72909d4bb1c7ae26f35d08e1946c7a2b33'),
    ('003', 'branch-office', '10.20.30.0/24', 'e0c94a17b25d83f66a1f0d7c4b982e5530ad6fc8172b49e3d5f08a61b7c3942d'),
    ('004', 'gateway.example', '10.20.0.0/16', '7f3a9c0e58d1b246c7e90f83a5d42b6118cf70e9d2a64b35f7810c9ed3b5a862'),
    ('005', 'web-v6', '2001:db8::10', '1d8e2b7f40a6c953e17f82d05bc36a9424e7d90b58f1c36a0972be4d816f5c30'),
    ('006', 'lab-v6', '2001:db8:1::/48', '93b7f05ed2481ac66e0d5f7938c1b24a57f60e9c2d8b3a41c5e97d04f682ab1f');
