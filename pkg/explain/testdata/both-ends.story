# Both ends count: everything may leave, nothing may come in.
policy one-way: {podSelector: {}, policyTypes: [Ingress, Egress], egress: [{}]}
? shop/web-1 shop/web-2 80/TCP
denied: shop/web-1 (10.0.0.1) -> shop/web-2 (10.0.0.2), port 80/TCP
  egress of shop/web-1: allowed: a policy admits this
    shop/one-way: egress[0] admits: everyone, every port
  ingress of shop/web-2: denied: one policy isolates it, and does not admit this
    shop/one-way: has no ingress rule: it admits nothing
=> no
? shop/web-1 203.0.113.7 443/TCP
allowed: shop/web-1 (10.0.0.1) -> 203.0.113.7, port 443/TCP
  egress of shop/web-1: allowed: a policy admits this
    shop/one-way: egress[0] admits: everyone, every port
=> yes

# What comes in may come from the other namespace, and not from the outside.
policy lab: {podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {tenant: lab}}}]}]}
? lab/tools shop/web-2 80/TCP
allowed: lab/tools (10.0.0.9) -> shop/web-2 (10.0.0.2), port 80/TCP
  egress of lab/tools: allowed: no policy isolates it
  ingress of shop/web-2: allowed: a policy admits this
    shop/one-way: has no ingress rule: it admits nothing
    shop/lab: ingress[0] admits: from[0] matches lab/tools, every port
=> yes
? 203.0.113.7 shop/web-2 80/TCP
denied: 203.0.113.7 -> shop/web-2 (10.0.0.2), port 80/TCP
  ingress of shop/web-2: denied: 2 policies isolate it, and none admits this
    shop/one-way: has no ingress rule: it admits nothing
    shop/lab: ingress[0] does not: from[0] selects pods, and 203.0.113.7 is none
=> no
? shop/web-1 lab/tools 80/TCP
allowed: shop/web-1 (10.0.0.1) -> lab/tools (10.0.0.9), port 80/TCP
  egress of shop/web-1: allowed: a policy admits this
    shop/one-way: egress[0] admits: everyone, every port
  ingress of lab/tools: allowed: no policy isolates it
=> yes

# Pods on a node's network are their node, and two pods that claim one address must both be admitted.
? lab/agent shop/web-2 80/TCP
allowed: 192.0.2.10 (the node) -> shop/web-2 (10.0.0.2), port 80/TCP
  a node always reaches its own pods
=> yes
? 10.0.0.20 shop/web-2 80/TCP
allowed: lab/twin-a and lab/twin-b (10.0.0.20) -> shop/web-2 (10.0.0.2), port 80/TCP
  egress of lab/twin-a: allowed: no policy isolates it
  egress of lab/twin-b: allowed: no policy isolates it
  ingress of shop/web-2: allowed: a policy admits this
    shop/one-way: has no ingress rule: it admits nothing
    shop/lab: ingress[0] admits: from[0] matches lab/twin-b, every port
=> yes
policy lab: {podSelector: {}, ingress: [{from: [{namespaceSelector: {}, podSelector: {matchLabels: {app: web}}}]}]}
? 10.0.0.20 shop/web-2 80/TCP
denied: lab/twin-a and lab/twin-b (10.0.0.20) -> shop/web-2 (10.0.0.2), port 80/TCP
  egress of lab/twin-a: allowed: no policy isolates it
  egress of lab/twin-b: allowed: no policy isolates it
  ingress of shop/web-2: denied: 2 policies isolate it, and none admits this
    shop/one-way: has no ingress rule: it admits nothing
    shop/lab: ingress[0] does not: from[0] wants pods with (app=web), and lab/twin-b has (app=other)
=> no
