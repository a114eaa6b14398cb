// A lit surface. GROUP 0: skin; 1: eyes, teeth, tongue; 2: lashes and hair. Each group is a program of its own, because
// software rendering executes both sides of every branch.
in vec3 point, outward, place;
in vec2 texel;
flat in int kind;
out vec4 colour;
uniform sampler2D source;  // the texture from paint.fragment.glsl
uniform vec3 hair, iris;
uniform vec4 strands;      // density, -, parting, swirl
uniform float oil;         // shine of the skin

Surface skin_surface() {
    vec4 painted = texture(source, texel);
    bool cloth = painted.a < .06;
    return Surface(painted.rgb * painted.rgb, cloth ? vec3(0) : vec3(.55, .16, .09), painted.a, cloth ? .03 : .25 * oil,
        cloth ? .1 : .35, 1., 1., key_arrives(point, normalize(outward)));
}

Surface eye_surface() {
    vec3 d = normalize(place);
    float q = acos(clamp(d.z, -1., 1.)), angle = atan(d.y, d.x);
    vec3 c = iris * (.7 + .5 * noise(vec3(angle * 6., q * 8., 2.))) * (.6 + .8 * smoothstep(.15, .48, q));
    c = mix(c, iris * .25, smoothstep(.42, .52, q));
    c = mix(c, vec3(.84, .81, .78) * (1. - .15 * smoothstep(.5, 1.2, q)), smoothstep(.48, .55, q));
    c = mix(vec3(.012), c, smoothstep(.17, .24, q));
    c *= mix(1., .45, smoothstep(.15, .55, d.y));  // the upper lid's shadow
    return Surface(c, vec3(.05, .02, .01), 1., .6, .2, 1., 1., .9);
}

Surface teeth_surface() {
    float gap = abs(fract(atan(place.x, place.z - .75) * 7.2) - .5) * 2.;
    vec3 c = vec3(.80, .76, .69) * mix(.75, 1., smoothstep(0., .25, 1. - gap));
    float dim = (.12 + .73 * smoothstep(1.05, 1.42, place.z)) * (1. - .7 * smoothstep(.12, .25, abs(place.x)));
    return Surface(c, vec3(.08), .6, .2, .35, 1., dim, .8);
}

Surface tongue_surface() {
    return Surface(vec3(.50, .20, .20), vec3(.55, .16, .09), .5, .25, .35, 1., .2 + .5 * smoothstep(.9, 1.38, place.z), .8);
}

Surface lash_surface() {
    return Surface(vec3(.025, .018, .015), vec3(0), 0., 0., .35, place.y > 7.26 ? .62 : .22, 1., 1.);
}

Surface hair_surface() {
    // The layer below the ribbons.
    float around = atan(place.x - strands.z, place.z - .15) + strands.w * (place.y - 7.5);
    float strand = noise(vec3(around * strands.x, place.y * 1.6, 1.));
    float height = above_hairline(place) + .16 * (strand - .5);
    // The curtain's texels count down from -1 at its top to -2 at its lower edge.
    float alpha = texel.x < 0. ? smoothstep(0., .08, texel.y + 2. + .12 * (strand - .5)) : smoothstep(-.03, .07, height);
    vec3 c = hair * (.35 + .6 * strand) * mix(.7, 1., smoothstep(0., .25, height));
    return Surface(c, vec3(0), .35, 0., .15, alpha, 1., .6);
}

void main() {
    vec3 normal = normalize(outward), view = normalize(eye - point);
#if GROUP == 0
    Surface s = skin_surface();
    float chin = length((place.xy - vec2(0., 6.)) / vec2(1.1, .55)) - .25 + step(.95, place.z);
    s.dim = mix(.78, 1., smoothstep(0., .5, chin));  // shade under the chin
#else
    if (dot(normal, view) < 0.) normal = -normal;
#if GROUP == 1
    Surface s = kind == 1 ? eye_surface() : kind == 2 ? teeth_surface() : tongue_surface();
#else
    Surface s = kind == 4 ? lash_surface() : hair_surface();
#endif
#endif
    colour = vec4(developed(lit(s, normal, view)), s.alpha);
}
